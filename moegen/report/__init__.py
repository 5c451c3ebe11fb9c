"""A page with pictures and tables of what was measured.

    from moegen import report
    page = report.write(["olmoe.json", "tuning.jsonl", "load.json"], "report")

takes any number of results of `moegen bench`, records of `moegen tune` and counts of `moegen.monitoring` and writes
`report/index.html`, which needs no other file, and the pictures beside it. Needs the `[report]` extra. The same files give the
same page.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ReportError

if TYPE_CHECKING:
    from ..monitoring import ExpertLoad


def write(paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the page and its pictures.

    Args:
        paths: results of `moegen bench`, records of `moegen tune`, and counts that `ExpertLoad.save` wrote, which are added up;
            which is which is told from the content.
        folder: where to; made when it is not there.

    Returns:
        The path of the page.

    Raises:
        ReportError: a file is missing or malformed, the folder cannot be written to, or what draws the pictures is not installed.
    """
    from . import page  # here, because it imports what draws the pictures

    return page.write(paths, folder)


def expert_load(load: ExpertLoad, path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws which experts work, as a PNG: bars per expert, evenness over time, and a heat map of layers and experts.

    Returns:
        The path of the picture.

    Raises:
        ReportError: the picture cannot be written, or what draws it is not installed.
    """
    from . import drawing, experts

    target = pathlib.Path(path)
    picture = drawing.png(experts.figure(load))
    try:
        target.write_bytes(picture)
    except OSError as error:
        raise ReportError(f"{target} cannot be written ({error.strerror}): give another path") from None
    return target
