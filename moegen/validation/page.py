"""The page of a validation: the verdict on every claim, where it was measured, and pictures; one HTML file."""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..display import NOTHING, size
from ..errors import ReportError
from ..report import page as report_page
from ..report import pictures as bench_pictures
from ..report import readings
from ..report.pictures import Picture
from ..report.tables import Row, Table
from ..version import __version__
from . import pictures
from .claims import FAIL, NOT_TESTED, PASS, counted, shown

Json = Mapping[str, Any]

PAGE = "index.html"
_KINDS = {PASS: "pass", FAIL: "fail", NOT_TESTED: "untested"}


def write(document: Json, bench: Json, folder: pathlib.Path) -> pathlib.Path:
    """Writes the page and its pictures; returns the page's path.

    Raises:
        ReportError: the folder cannot be written to.
    """
    drawn = [*pictures.draw(document), *_of_bench(bench)]
    text = (
        report_page.environment()
        .get_template("report/validation.html.jinja")
        .render(
            version=__version__,
            document=document,
            counted=counted(document["verdicts"]),
            failed=any(verdict["status"] == FAIL for verdict in document["verdicts"]),
            where=list(_where(document)),
            layers=[(layer, _verdicts(document, layer["label"])) for layer in document["layers"]],
            ratios=_ratios(document),
            pictures=[(picture, base64.b64encode(picture.png).decode("ascii")) for picture in drawn],
        )
    )
    try:
        for picture in drawn:
            (folder / picture.file).write_bytes(picture.png)
        (folder / PAGE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{folder} cannot be written to ({error.strerror}): give another folder") from None
    return folder / PAGE


def _of_bench(bench: Json) -> Iterator[Picture]:
    """The pictures of the benchmark that say how fast."""
    runs = [readings.Run(run["name"], run) for run in bench["runs"] if run["points"]]
    drawn = bench_pictures.draw(readings.Readings([], runs, [])) if runs else iter(())
    yield from (picture for picture in drawn if picture.file.startswith(("throughput", "roofline", "parts")))


def _where(document: Json) -> Iterator[tuple[str, str]]:
    environment = document["environment"]
    machine = environment["machine"]
    yield "processor", f"{environment['processor']}; {machine['processors']} may be used"
    yield "instructions", " ".join(environment["features"]) or NOTHING
    free, cache = size(environment["available_bytes"]), size(machine["l3_bytes"])
    yield "memory", f"{size(machine['memory_bytes'])}, {free} of it free, {cache} of L3 cache"
    yield (
        "GPU",
        f"{', '.join(environment['gpus'])}: not tested here, `python -m moegen.field` does" if environment["gpus"] else "none",
    )
    others = document["others"]
    yield "other processes", "not known" if others is None else f"had {others:.0%} of the processors meanwhile"
    yield "compiler", environment["compiler"] or "none"
    yield "system", environment["system"]
    packages = {name: version or "not installed" for name, version in environment["packages"].items()}
    yield "packages", ", ".join(f"{name} {version}" for name, version in {"python": environment["python"], **packages}.items())


def _verdicts(document: Json, label: str) -> Table:
    rows = []
    for verdict in document["verdicts"]:
        if verdict["layer"] == label:
            value = NOTHING if verdict["value"] is None else shown(verdict["value"], verdict["unit"])
            cells = [verdict["status"], verdict["says"], value, verdict["threshold"], verdict["words"]]
            rows.append(Row(cells, _KINDS[verdict["status"]]))
    return Table(["", "claim", "measured", "threshold", "how"], rows, words=5)


def _ratios(document: Json) -> Table | None:
    rows = []
    for layer in document["layers"]:
        for one in layer["ratios"]:
            interval = [f"{one['median']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}", f"{100 * one['confidence']:.1f} %"]
            rows.append(Row([layer["label"], one["contender"], str(one["tokens"]), *interval, str(one["rounds"])]))
    header = ["layer", "contender", "T, tokens", "time / ours", "interval", "confidence", "quiet rounds"]
    return Table(header, rows, words=2) if rows else None
