"""The settings of the store that no user chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreRules:
    """Waiting times and limits of the store. None of them changes what is stored.

    Attributes:
        busy_seconds:
            Seconds that SQLite waits for another process's transaction, which may write a large
            spectrum. Not ablated yet.
        patience_seconds:
            Seconds during which a lost connection is opened again: a server takes about this long
            to restart.
        opening_patience_seconds:
            The same while a store is opened, where the server may also not exist at all.
        lock_seconds:
            Seconds that MySQL waits for another process's migration. Not ablated yet.
        beats_per_lease:
            Signs of life that a worker gives during the time of its lease: three of four may be
            lost.
        touch_seconds:
            Readers write down at most this often that a spectrum is in use.
        message_seconds:
            A worker that waits says so at most this often.
        shortest_wait_seconds:
            First pause between two looks at whether another worker has finished.
        longest_wait_seconds:
            Longest pause between two such looks.
        checkpoint_seconds:
            Age from which blocks of an unfinished computation are deleted: a week.
        file_grace_seconds:
            Age from which files of the object folder that no row names are deleted: a file is
            written before the row that names it is committed.
        learned_characters:
            The longest JSON of what was learned of a task. Not ablated yet.
        learned_tries:
            Tries to merge into what was learned while other workers do the same.
    """

    busy_seconds: int = 120
    patience_seconds: float = 60.0
    opening_patience_seconds: float = 20.0
    lock_seconds: int = 600
    beats_per_lease: int = 4
    touch_seconds: float = 60.0
    message_seconds: float = 30.0
    shortest_wait_seconds: float = 0.05
    longest_wait_seconds: float = 2.0
    checkpoint_seconds: float = 7 * 86400.0
    file_grace_seconds: float = 3600.0
    learned_characters: int = 16 * 2**20
    learned_tries: int = 1000


RULES = StoreRules()
