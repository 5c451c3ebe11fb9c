"""The page: what was measured, its pictures and every number, in one HTML file."""

from __future__ import annotations

import base64
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..display import size
from ..errors import ReportError, without_pictures
from ..paths import package_folder
from ..version import __version__
from . import experts, pictures, tables
from .pictures import Picture
from .readings import Bench, Readings, read

try:
    import jinja2
except ModuleNotFoundError as error:
    raise without_pictures(error) from None

PAGE = "index.html"


def write(paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> pathlib.Path:
    """See `moegen.report.write`."""
    readings = read(paths)
    drawn = list(pictures.draw(readings))
    page = _page(readings, drawn)
    target = pathlib.Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for picture in drawn:
            (target / picture.file).write_bytes(picture.png)
        (target / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{target} cannot be written to ({error.strerror}): give another folder") from None
    return target / PAGE


def environment() -> jinja2.Environment:
    """Where the templates of pages are."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(package_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page(readings: Readings, drawn: Sequence[Picture]) -> str:
    return (
        environment()
        .get_template("report/page.html.jinja")
        .render(
            version=__version__,
            benches=[_bench(bench) for bench in readings.benches],
            tunings=[tuning.label for tuning in readings.tunings],
            pictures=[(picture, base64.b64encode(picture.png).decode("ascii")) for picture in drawn],
            overview=tables.overview(readings),
            without_speed=tables.without_speed(readings),
            absent=tables.absent(readings),
            scaled=tables.scaled(readings),
            tuning=tables.tuning(readings.tunings),
            experts=None if readings.load is None else experts.table(readings.load),
            runs=[tables.run_text(run) for run in readings.runs],
        )
    )


def _bench(bench: Bench) -> Mapping[str, Any]:
    """What the page says about a results file: where and with what it was measured."""
    machine = bench.data["machine"]
    memory, cache = machine["memory_bytes"], machine["l3_bytes"]
    words = [machine["cpu"], f"{machine['processors']} processors"]
    words += [f"{size(memory)} of memory"] if memory is not None else []
    words += [f"{size(cache)} of L3 cache"] if cache is not None else []
    versions = ", ".join(f"{name} {version}" for name, version in bench.data["versions"].items())
    return {"file": bench.file, "created": bench.data["created"], "machine": ", ".join(words), "versions": versions}
