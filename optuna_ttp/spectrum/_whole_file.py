"""Writing files that are either complete or absent, also after a crash."""

from __future__ import annotations

from collections.abc import Iterable
import errno
import os
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file so that the path holds either the old or the complete new content.

    The pieces go to a partial file beside it, which replaces the path once it is on the disk.
    Raises OSError if the path is a folder, a device or a pipe.
    """
    # Path(".") has no name to derive the partial file's name from.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        # Replacing a device or a pipe would break it for all other programs.
        raise OSError(errno.EINVAL, "Not a file that can be replaced", str(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.{uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            # Otherwise a power cut may leave an empty file under the new name.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
