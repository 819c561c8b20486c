"""The map from trial parameters to learning rate, batch size and momentum."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import copy
import dataclasses
from dataclasses import dataclass
import inspect
import math
from numbers import Real
from typing import Any
from typing import NamedTuple


Source = str | float | Callable[[Mapping[str, Any]], float | None]
_EXAMPLES: Mapping[str, float] = {"learning_rate": 0.01, "batch_size": 32, "momentum": 0.9}


class Configuration(NamedTuple):
    """Values of the three hyperparameters of a trial."""

    learning_rate: float
    batch_size: int
    momentum: float

    def clipped(self, n_samples: int) -> Configuration:
        """Return the configuration with at most ``n_samples`` per batch, as data loaders give."""
        return self._replace(batch_size=min(self.batch_size, n_samples))


class MissingParameterError(ValueError):
    """The map reads a parameter that the trial does not have."""


@dataclass(frozen=True)
class HyperparameterMap:
    """The map from a trial's parameters to its learning rate, batch size and momentum.

    Each is the name of a trial parameter, a fixed number, or a function of the trial's parameters
    (a mapping from names to values). A function may return :obj:`None` if the trial has no such
    hyperparameter, for example in the branch of a conditional space that uses another optimiser:
    such a trial gets no prediction. A batch size above the number of samples counts as that
    number, because a data loader gives no more. A sampler or pruner with a lambda cannot be
    pickled; use a function of a module if it must be.

    Example:
        >>> mapping = HyperparameterMap(
        ...     learning_rate="lr", batch_size=lambda p: 2 ** p["log2_batch"], momentum=0.9
        ... )
        >>> mapping.resolve({"lr": 0.01, "log2_batch": 5})
        Configuration(learning_rate=0.01, batch_size=32, momentum=0.9)

    Args:
        learning_rate:
            The source of the learning rate. The parameter ``"learning_rate"`` by default.
        batch_size:
            The source of the batch size. The parameter ``"batch_size"`` by default.
        momentum:
            The source of the momentum. The parameter ``"momentum"`` by default; if a trial lacks
            it, the momentum of the predictor's optimiser.

    Raises:
        TypeError:
            If a source is neither a name nor a number nor a function of one argument.
        ValueError:
            If a fixed number is out of its range.
    """

    learning_rate: Source = "learning_rate"
    batch_size: Source = "batch_size"
    momentum: Source = "momentum"
    _default_momentum: float | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for field, source in self._sources():
            if isinstance(source, Real) and not isinstance(source, bool):
                _check_fixed(field, float(source))
            elif not ((isinstance(source, str) and source) or callable(source)):
                raise TypeError(
                    f"{field} must be a parameter's name, a number or a function of the trial's "
                    f"parameters but got {source!r}."
                )
            elif callable(source) and not _takes_one(source):
                raise TypeError(
                    f"{field} must be a function of one argument, the trial's parameters by "
                    f"their names, but got {source!r}, which takes "
                    f"{inspect.signature(source)}."
                )

    def resolve(self, params: Mapping[str, Any]) -> Configuration | None:
        """Return the hyperparameters of a trial.

        Args:
            params:
                The trial's parameters, values by name.

        Returns:
            The three values, or :obj:`None` if a function returned :obj:`None`, or if the map is
            the default one and the trial has none of its parameters.

        Raises:
            MissingParameterError:
                If the trial lacks a parameter that the map reads.
            TypeError:
                If a value is not a number.
            ValueError:
                If the batch size is not a whole number, or a function fails.
        """
        values: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for field, source in self._sources():
            value, name = _read(field, source, params)
            if name is None:
                values[field] = value
            elif self._has_default(field, source):
                values[field] = self._default_momentum
            else:
                missing[field] = name
        if any(value is None for value in values.values()):
            return None
        if missing:
            if self == HyperparameterMap() and not self._reads_any(params):
                return None
            field, name = next(iter(missing.items()))
            raise MissingParameterError(
                f"The hyperparameter map reads {field} from the parameter {name!r}, but the trial "
                f"only has {sorted(params)}. Name the right parameter, suggest it before "
                f"should_prune() is called, give a fixed value "
                f"(HyperparameterMap({field}={_EXAMPLES[field]})), or pass a function that "
                "returns None where there is none."
            )
        for field, value in values.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(
                    f"The hyperparameter map must give numbers: {field} must be a number but got "
                    f"{value!r}."
                )
        if not float(values["batch_size"]).is_integer():
            raise ValueError(f"batch_size must be a whole number but got {values['batch_size']}.")
        return Configuration(
            float(values["learning_rate"]), int(values["batch_size"]), float(values["momentum"])
        )

    def parameters_read(self, params: Mapping[str, Any]) -> frozenset[str]:
        """Return the names of the parameters that :meth:`resolve` reads.

        Args:
            params:
                An example of a trial's parameters, with which the functions are called.

        Returns:
            The names, also of parameters that the example lacks. A missing momentum parameter is
            left out if the map has a default momentum.
        """
        read: set[str] = set()
        for field, source in self._sources():
            if isinstance(source, str):
                if source in params or not self._has_default(field, source):
                    read.add(source)
            elif callable(source):
                read |= _asked(source, params)
        return frozenset(read)

    def with_default_momentum(self, momentum: float | None) -> HyperparameterMap:
        """Return a copy of this map, equal to it, with a default momentum.

        Args:
            momentum:
                The momentum of a trial without the momentum parameter. With :obj:`None` such a
                trial raises :exc:`MissingParameterError`.

        Returns:
            The copy.
        """
        twin = copy.copy(self)
        object.__setattr__(twin, "_default_momentum", momentum)
        return twin

    def _reads_any(self, params: Mapping[str, Any]) -> bool:
        return bool(self.parameters_read(params) & set(params))

    def _sources(self) -> Iterator[tuple[str, Source]]:
        for name in ("learning_rate", "batch_size", "momentum"):
            yield name, getattr(self, name)

    def _has_default(self, field: str, source: Source) -> bool:
        return (
            field == "momentum" and isinstance(source, str) and self._default_momentum is not None
        )


def map_or_default(hyperparameters: HyperparameterMap | None) -> HyperparameterMap:
    """Return the argument ``hyperparameters``, or the default map for None; else TypeError."""
    if hyperparameters is None:
        return HyperparameterMap()
    if not isinstance(hyperparameters, HyperparameterMap):
        raise TypeError(
            f"hyperparameters must be a HyperparameterMap but got {hyperparameters!r}."
        )
    return hyperparameters


def _check_fixed(field: str, value: float) -> None:
    good = {
        "learning_rate": 0.0 < value < math.inf,
        "batch_size": value >= 1.0 and value.is_integer(),
        "momentum": 0.0 <= value < 1.0,
    }
    if not good[field]:
        wanted = {
            "learning_rate": "positive and finite",
            "batch_size": "a positive whole number",
            "momentum": "in [0, 1)",
        }
        raise ValueError(f"A fixed {field} must be {wanted[field]} but got {value:g}.")


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind({})
    except TypeError:
        return False
    except ValueError:  # Some functions that are written in C have no signature.
        return True
    return True


def _read(field: str, source: Source, params: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return a field's value and None, or None and the name of the missing parameter.

    Raise ValueError if the source is a function that fails for another reason.
    """
    if isinstance(source, str):
        return (params[source], None) if source in params else (None, source)
    if not callable(source):
        return source, None
    try:
        return source(params), None
    except Exception as error:
        missing = error.args[0] if isinstance(error, KeyError) and error.args else None
        # A KeyError may also come from a dictionary of the function itself.
        if missing is not None and missing not in params and missing in _asked(source, params):
            return None, str(missing)
        raise ValueError(
            f"The function that the hyperparameter map has for {field} must return a number or "
            f"None, but got {type(error).__name__}: {error}, for the parameters {dict(params)}."
        ) from error


def _asked(source: Callable[[Mapping[str, Any]], Any], params: Mapping[str, Any]) -> set[str]:
    """Return the names of the parameters that a function reads, until it returns or fails."""
    recorder = _Recorder(params)
    # The exception is raised again when the map is resolved.
    with contextlib.suppress(Exception):
        source(recorder)
    return recorder.read


class _Recorder(Mapping[str, Any]):
    """A mapping of parameters that collects the names that were looked up, in ``read``."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)
