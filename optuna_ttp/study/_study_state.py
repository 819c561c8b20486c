"""The state of one study in this process."""

from __future__ import annotations

from collections.abc import Callable
import threading
from typing import Any
from typing import cast
from typing import TYPE_CHECKING
from typing import TypeVar
from weakref import WeakKeyDictionary

from optuna_ttp.study._optuna_compat import remembered_for


if TYPE_CHECKING:
    import optuna


_T = TypeVar("_T")


class StudyState:
    """The state of one study in this process, shared by its sampler, pruner, logs and report.

    It consists of parts, one object per class that has a state. It ends with the storage object of
    the study, and is neither pickled nor copied with it. Threads share it: code that reads a part
    and then changes it must hold ``lock``.

    Attributes:
        lock: A re-entrant lock, because the garbage collector may close an open training log at
            any moment.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._shared: dict[Callable[[], Any], Any] = {}
        self._owned: WeakKeyDictionary[object, Any] = WeakKeyDictionary()

    def part(self, make: Callable[[], _T]) -> _T:
        """Return the study's part of the class ``make``, which is called at first use."""
        with self.lock:
            if make not in self._shared:
                self._shared[make] = make()
            return cast(_T, self._shared[make])

    def part_of(self, owner: object, make: Callable[[], _T]) -> _T:
        """Return the part of one sampler or pruner, made by ``make`` at first use.

        It is deleted together with its owner.
        """
        with self.lock:
            if owner not in self._owned:
                self._owned[owner] = make()
            return cast(_T, self._owned[owner])


def state_of(study: optuna.Study) -> StudyState:
    """Return the state of a study, the same for every Study object on the same storage object."""
    return remembered_for(study, StudyState)
