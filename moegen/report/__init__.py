"""A page with pictures and tables of what was measured.

    from moegen import report
    page = report.write(["olmoe.json", "tuning.jsonl"], "report")

takes any number of results of `moegen bench` and records of `moegen tune` and writes `report/index.html`, which needs no other
file, and the pictures beside it. Needs the `[report]` extra. The same files give the same page.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence


def write(paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the page and its pictures.

    Args:
        paths: results of `moegen bench` and records of `moegen tune`; which is which is told from the content.
        folder: where to; made when it is not there.

    Returns:
        The path of the page.

    Raises:
        ReportError: a file is missing or malformed, the folder cannot be written to, or what draws the pictures is not installed.
    """
    from . import page  # here, because it imports what draws the pictures

    return page.write(paths, folder)
