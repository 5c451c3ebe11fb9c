"""Files of NVIDIA's wheels (`pip install 'moegen[cuda]'`), wherever they are installed."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import pathlib

ADVICE = "pip install 'moegen[cuda]'"


def find(distribution: str, pattern: str) -> pathlib.Path | None:
    """A file of an installed distribution, by a pattern for the end of its path (`bin/nvdisasm`); None where it is missing."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if fnmatch.fnmatchcase(f"/{file}", f"*/{pattern}"):
            path = pathlib.Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def version(distribution: str) -> str:
    """The version of an installed distribution."""
    return importlib.metadata.version(distribution)
