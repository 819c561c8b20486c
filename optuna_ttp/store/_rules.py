"""The settings of the store that no user chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreRules:
    """Waiting times and limits of the store. None of them changes a stored spectrum.

    Attributes:
        busy_seconds:
            Seconds that SQLite waits for another process's transaction, which may write a large
            spectrum. A choice: waiting steers no result.
        patience_seconds:
            Seconds during which a lost connection is opened again: a server takes about this long
            to restart.
        opening_patience_seconds:
            The same while a store is opened, when the server may also not exist at all.
        lock_seconds:
            Seconds that MySQL waits for another process's migration. A choice, as above.
        beats_per_lease:
            Number of times that a worker prolongs its lease before it would expire: three of four
            attempts may fail.
        touch_seconds:
            Seconds for which readers do not update a spectrum's time of last use.
        message_seconds:
            Seconds between two log messages of a waiting worker.
        shortest_wait_seconds:
            First pause between two checks whether another worker has finished.
        longest_wait_seconds:
            Longest pause between two such checks.
        checkpoint_seconds:
            Age from which blocks of an unfinished computation are deleted: a week.
        file_grace_seconds:
            Age from which files of the object folder that no row names are deleted: a file is
            written before the row that names it is committed.
        learned_characters:
            The maximum number of JSON characters of a learned value: a guard against
            values of other programs.
        learned_tries:
            Attempts to change a learned value while other workers do the same.
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
