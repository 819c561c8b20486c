"""What the trials of one study tell the next one on the same task."""

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
# So many of the newest trials are kept: as many as a calibration looks at.
_MOST = 128


class Memory:
    """Keeps observed trials beside the spectrum, for the next study on the same task.

    What is remembered corrects predictions, but :func:`~optuna_ttp.report` counts the trials of
    its own study alone.

    Example:
        >>> memory = Memory(store)
        >>> predictor = memory.recall(predictor)  # before sampler and pruner get it
        >>> study.optimize(objective, callbacks=[memory])

    Args:
        store:
            Where the spectrum is.
        hyperparameters:
            Which trial parameter is which hyperparameter, as for the sampler and the pruner.

    Raises:
        TypeError:
            If ``store`` is no :class:`~optuna_ttp.SpectrumStore`.
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
        """Return the predictor as the trials of earlier studies have corrected it.

        Args:
            predictor:
                Knows the task.

        Returns:
            A predictor that shares everything else with this one; this one where nothing is
            remembered.

        Raises:
            StoreError:
                If the database fails.
            TypeError:
                If ``predictor`` is none.
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
        """Remember a trial that has finished: a callback of :meth:`optuna.Study.optimize`.

        Args:
            study:
                The study.
            trial:
                The trial.

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
    """Return a remembered trial, None if it cannot be read."""
    try:
        return Observation.from_json(values)
    except ValueError as error:
        _logger.warning(f"A remembered trial is left out. {error}")
        return None
