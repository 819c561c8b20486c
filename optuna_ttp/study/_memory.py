"""Memory of observed trials for later studies on the same task."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna.logging import get_logger

from optuna_ttp._util.checks import check_kind
from optuna_ttp.calibration import Observation
from optuna_ttp.prediction import check_predictor
from optuna_ttp.study._hyperparameters import HyperparameterMap
from optuna_ttp.study._hyperparameters import map_or_default
from optuna_ttp.study._learner import observation_in


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.store import SpectrumStore


_logger = get_logger("optuna.ttp.memory")
_Predictor = TypeVar("_Predictor", bound="SearchPredictor")

_KIND = "observations"
# The number of newest trials that are kept, the same as a calibration uses.
_MOST = 128


class Memory:
    """Stores observed trials beside the spectrum, for later studies on the same task.

    Stored trials correct the predictions of later studies, but are not counted by
    :func:`~optuna_ttp.report`.

    Example:
        >>> memory = Memory(store)
        >>> predictor = memory.recall(predictor)  # before sampler and pruner get it
        >>> study.optimize(objective, callbacks=[memory])

    Args:
        store:
            The store that holds the spectrum.
        hyperparameters:
            The map from trial parameters to hyperparameters, as for the sampler and the pruner.

    Raises:
        TypeError:
            If ``store`` is not a :class:`~optuna_ttp.SpectrumStore`.
    """

    def __init__(
        self, store: SpectrumStore, *, hyperparameters: HyperparameterMap | None = None
    ) -> None:
        from optuna_ttp.store import SpectrumStore

        check_kind("store", store, SpectrumStore)
        self._store = store
        self._map = map_or_default(hyperparameters)
        self._predictor: SearchPredictor | None = None

    def __repr__(self) -> str:
        return f"Memory({self._store!r})"

    def recall(self, predictor: _Predictor) -> _Predictor:
        """Return the predictor corrected by earlier studies; later trials are stored for it.

        Args:
            predictor:
                The predictor of the task.

        Returns:
            A predictor that is otherwise equal, or the same object if no trial is stored.

        Raises:
            StoreError:
                If the database fails.
            TypeError:
                If ``predictor`` is not a predictor.
        """
        check_predictor(predictor)
        self._predictor = predictor
        learned = self._store.get_learned(predictor.fingerprint, _KIND)
        if learned is None:
            return predictor
        read = [_read(values) for _, values in learned.payload]
        observations = [one for one in read if one is not None]
        _logger.info(f"Remembered {len(observations)} trials of earlier studies.")
        return predictor.informed(observations)

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Store the observation of a finished trial; nothing if it has no usable loss curve.

        This makes the object a callback of :meth:`optuna.Study.optimize`.

        Args:
            study:
                The study.
            trial:
                The trial that has finished.

        Raises:
            RuntimeError:
                If :meth:`recall` was not called before.
            StoreError:
                If the database fails.
        """
        if self._predictor is None:
            raise RuntimeError("Memory must recall(predictor) before a study calls it.")
        observation = observation_in(study, trial, self._predictor, self._map)
        if observation is None:
            return
        name = f"{study.study_name} {trial.number}"

        def merged(payload: Any) -> Any:
            others = [entry for entry in payload or [] if entry[0] != name]
            return [*others, [name, observation.to_json()]][-_MOST:]

        fingerprint = self._predictor.fingerprint
        self._store.update_learned(fingerprint, _KIND, merged)


def _read(values: Any) -> Observation | None:
    """Return a stored observation; log a warning and return None if it cannot be read."""
    try:
        return Observation.from_json(values)
    except ValueError as error:
        _logger.warning(f"A remembered trial is left out. {error}")
        return None
