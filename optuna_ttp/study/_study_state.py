"""What this process remembers of one study."""

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
    """All that this process remembers of one study, shared by everything that works on the study.

    It consists of parts, one object for each class that has something to remember. The state ends
    with the storage object of the study, and is neither pickled nor copied with it. Threads share
    it: whoever reads a part and then changes it holds :attr:`lock`.

    Attributes:
        lock: It is re-entrant, because an open training log may be closed by the garbage collector
            at any moment.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._shared: dict[Callable[[], Any], Any] = {}
        self._owned: WeakKeyDictionary[object, Any] = WeakKeyDictionary()

    def part(self, make: Callable[[], _T]) -> _T:
        """Return the part that a class or function without arguments makes, one for the study."""
        with self.lock:
            if make not in self._shared:
                self._shared[make] = make()
            return cast(_T, self._shared[make])

    def part_of(self, owner: object, make: Callable[[], _T]) -> _T:
        """Return the part of one sampler or pruner; it is forgotten together with its owner."""
        with self.lock:
            if owner not in self._owned:
                self._owned[owner] = make()
            return cast(_T, self._owned[owner])


def state_of(study: optuna.Study) -> StudyState:
    """Return the state of a study; the same object for every object of the study."""
    return remembered_for(study, StudyState)
