"""Large blobs as files, named by their content."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
import os
from pathlib import Path
import re
import time
from typing import BinaryIO
from uuid import uuid4

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import StoreError
from optuna_ttp.spectrum import blob
from optuna_ttp.store._rules import RULES


class ObjectFolder:
    """Files named by the digest of their content, each complete or absent.

    The folder is made, for the user alone, if it does not exist. Raises StoreError if that fails.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"Could not make the folder {self._path}: {error}") from error

    def write(self, pieces: Iterable[bytes], digest: blob.Digest) -> int:
        """Write a file and return its bytes; ``digest`` is its name once all pieces are made.

        Raises StoreError if the file cannot be written.
        """
        partial = self._path / f"{uuid4().hex}.partial"
        n_bytes = 0
        try:
            with partial.open("xb") as file:
                partial.chmod(0o600)
                for piece in pieces:
                    file.write(piece)
                    n_bytes += len(piece)
                file.flush()
                os.fsync(file.fileno())
            target = self._file(digest.hexdigest())
            target.parent.mkdir(mode=0o700, exist_ok=True)
            # An existing target is replaced, too: its age protects it until the row is committed.
            partial.replace(target)
        except OSError as error:
            raise StoreError(f"Could not write to the folder {self._path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return n_bytes

    def open(self, name: str) -> BinaryIO:
        """Open the file of a digest, ``name``, for reading.

        Raises DamagedSpectrumError if that file is missing, StoreError if the folder cannot be
        read or is empty.
        """
        try:
            return self._file(name).open("rb")
        except FileNotFoundError as error:
            # The folder of a share that is not mounted is empty, but its spectra are not damaged.
            if next(self._path.glob("??"), None) is None:
                raise StoreError(
                    f"The arrays lie in an object folder but {self._path} is empty. Mount it, or "
                    "open the store with the object_folder that the other workers use. If its "
                    "files are lost, delete their spectra."
                ) from error
            raise DamagedSpectrumError(f"its file is missing ({error.strerror})") from error
        except OSError as error:
            raise StoreError(f"Could not read the folder {self._path}: {error}") from error

    def delete_unused(
        self, used: set[str], *, grace_seconds: float = RULES.file_grace_seconds
    ) -> int:
        """Delete files whose names are not in ``used``, and return their total of bytes.

        Files younger than ``grace_seconds`` stay, too: their rows may not be committed yet.
        """
        n_bytes = 0
        for file in self._files():
            status = file.stat()
            if file.name not in used and status.st_mtime < time.time() - grace_seconds:
                file.unlink(missing_ok=True)
                n_bytes += status.st_size
        return n_bytes

    def _files(self) -> Iterator[Path]:
        """Yield the files that a store wrote into the folder, partial files included."""
        yield from self._path.glob("*.partial")
        yield from (file for file in self._path.glob("??/*") if _is_name(file.name))

    def _file(self, name: str) -> Path:
        """Return the path of a digest's file; raise DamagedSpectrumError if it is no digest."""
        # The name comes from a row, which may be forged.
        if not _is_name(name):
            raise DamagedSpectrumError("its file has an impossible name")
        return self._path / name[:2] / name


def _is_name(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None
