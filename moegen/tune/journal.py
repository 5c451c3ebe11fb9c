"""A file of tuning records while it is written: one writer at a time, whole lines only, nothing lost when the disk is full."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ..errors import RecordError
from ..records import Line, read


class Journal:
    """The records of one layer and regime, open for adding lines; a context manager.

    What a killed run left of a line is cut off.

    Args:
        path: the file; made with its folder when it is not there.

    Raises:
        RecordError: another process has it, or it cannot be written.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RecordError(f"cannot write tuning records to {str(path)!r}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise RecordError(f"{str(path)!r} is being written by another run of moegen: wait for it, or end it") from error
        self._cut()
        self.lines: list[Line] = list(read(path).lines)

    def _cut(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.ftruncate(self._file, data.rfind(b"\n") + 1)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line and brings it to the disk.

        Raises:
            RecordError: it cannot be written; the file is as it was before.
        """
        data = (json.dumps(line) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise RecordError(
                f"cannot write to {str(self.path)!r} ({error.strerror}): what was measured before is kept; "
                "make room, and run the same command to go on"
            ) from error
        self.lines.append(line)

    def close(self) -> None:
        """Lets others write; a file that got no line is removed."""
        if self._file >= 0:
            if os.fstat(self._file).st_size == 0:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
