"""Functions for several processes that compute one spectrum, and that share their errors."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import importlib
from typing import Any
from typing import cast
from typing import TYPE_CHECKING
from typing import TypeVar

import torch
import torch.distributed as distributed

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.jacobian._claims import UnclaimedError


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


_Object = TypeVar("_Object")
_Item = TypeVar("_Item")

# These exceptions are raised by all processes if one of them raises them.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, JacobianMismatchError)
}


def _release_default_group() -> None:
    """Remove process groups from the default arguments of ``torch.distributed.nn.functional``.

    PyTorch's compiler imports that module, perhaps in the middle of a computation. A group that
    exists by then becomes the default of its functions and outlives ``destroy_process_group``; its
    threads abort the process if they release a tensor while the interpreter ends. The default
    :obj:`None`, which the functions have if there is no group at import, means the same.
    """
    if not distributed.is_available():
        return
    functional = importlib.import_module("torch.distributed.nn.functional")
    for function in vars(functional).values():
        defaults = getattr(function, "__defaults__", None) or ()
        if any(isinstance(d, distributed.ProcessGroup) for d in defaults):
            function.__defaults__ = tuple(
                None if isinstance(d, distributed.ProcessGroup) else d for d in defaults
            )


_release_default_group()


def has_group() -> bool:
    """Return whether the default group of ``torch.distributed`` is initialised."""
    return distributed.is_available() and distributed.is_initialized()


def check_group() -> None:
    """Raise ValueError if the default group of ``torch.distributed`` is not initialised."""
    if not has_group():
        raise ValueError(
            "distributed=True needs a group of processes: call "
            "torch.distributed.init_process_group first, as under torchrun."
        )


def check_same_task(task: FineTuningTask, settings: Mapping[str, object]) -> None:
    """Raise ValueError in all processes if their tasks or settings are not the same."""
    check_group()
    described = {name: repr(value) for name, value in settings.items()}
    described_here = {"fingerprint": task.fingerprint, **described}
    if all(other == described_here for other in gathered_objects(described_here)):
        return
    # The parts are hashed only if they are needed, because all weights are read once more.
    parts = gathered_objects({**task.part_fingerprints(), **described})
    different = [
        (rank, name)
        for rank, part in enumerate(parts)
        for name, value in part.items()
        if value != parts[0][name]
    ]
    ranks = sorted({rank for rank, _ in different})
    names = [name for name in parts[0] if any(name == other for _, other in different)]
    raise ValueError(
        "All processes must be given the same task and settings but got different ones: "
        f"processes {', '.join(map(str, ranks))} differ from process 0 in {', '.join(names)}. "
        "Load the same weights and data, in the same order, in every process; what is drawn at "
        "random must be drawn with the same seed."
    )


def gathered_objects(here: _Object) -> list[_Object]:
    """Return a list of the objects ``here`` of all processes, by rank, in every process.

    The objects must be picklable. RuntimeError is raised if another process has ended.
    """
    gathered: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(gathered, here)
    except RuntimeError as error:
        raise RuntimeError(
            "Another process of the group must have failed or ended, because it no longer answers "
            f"process {distributed.get_rank()}. Look for the first error among what the others "
            "have printed, and call compute_spectrum in all of them. The group says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return gathered


def together(run: Callable[[], _Object]) -> _Object:
    """Call ``run`` in every process and return its result; an error in one is raised in all.

    Otherwise the processes without an error would wait forever. They raise ValueError, TypeError
    and JacobianMismatchError as such, and any other error as :exc:`RuntimeError`.
    """
    result: _Object | None = None
    error: Exception | None = None
    try:
        result = run()
    except Exception as caught:
        error = caught
    unclaimed = error.names if isinstance(error, UnclaimedError) else None
    failures = gathered_objects(
        None if error is None else (type(error).__name__, str(error), unclaimed)
    )
    names = [f[2] for f in failures if f is not None and f[2]]
    if names:
        # All processes must then replace the same modules by the modules around them.
        raise UnclaimedError(frozenset().union(*names), "do not run for all samples") from error
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind = _KINDS.get(failure[0], RuntimeError)
            raise kind(f"Process {rank} has failed: {failure[1]}")
    return cast("_Object", result)


def shared_out(run: Callable[[_Item], _Object], items: Sequence[_Item]) -> list[_Object]:
    """Call ``run`` for every item, each in one of the processes; return all results, in order.

    Every process gets the results, which must be picklable. Errors are those of :func:`together`.
    """
    n_processes = distributed.get_world_size()
    # The first process gets the fewest items, because it alone computes those of by_first().
    items_here = items[n_processes - 1 - distributed.get_rank() :: n_processes]
    parts = gathered_objects(together(lambda: [run(item) for item in items_here]))
    return [parts[n_processes - 1 - k % n_processes][k // n_processes] for k in range(len(items))]


def part_of_this_process(n_items: int) -> slice:
    """Return the range of a number of items that belongs to this process."""
    rank, n_processes = distributed.get_rank(), distributed.get_world_size()
    return slice(n_items * rank // n_processes, n_items * (rank + 1) // n_processes)


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by the sum of those of all processes, in every process."""
    distributed.all_reduce(tensor)


def in_all(run: Callable[[], _Object], *, distributed: bool) -> _Object:
    """Return ``run()``; with ``distributed``, an error in one process is raised in all."""
    return together(run) if distributed and has_group() else run()


def by_first(run: Callable[[], _Object]) -> _Object:
    """Call ``run`` in the first process only; return its result, which is pickled, in all.

    Errors are those of :func:`together`.
    """
    box = [together(lambda: run() if distributed.get_rank() == 0 else None)]
    distributed.broadcast_object_list(box, src=0)
    return cast("_Object", box[0])
