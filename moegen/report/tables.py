"""The tables of a report as rows of text, every number with its unit in the heading; a wrong result has no speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..bench.contenders.roster import OURS
from ..bench.results import changes
from ..display import NOTHING, number, percent, scientific, size
from .readings import Readings, Run, Tuning, correct

Json = Mapping[str, Any]


class Row(NamedTuple):
    """Cells of text; kind is "", "ours" or "bad"."""

    cells: list[str]
    kind: str = ""


class Table(NamedTuple):
    """The first `words` columns are words, the others numbers."""

    header: list[str]
    rows: list[Row]
    words: int = 1


class RunText(NamedTuple):
    """What the page says about one run."""

    label: str
    facts: list[tuple[str, str]]
    scaled: str
    absent: list[tuple[str, str]]
    points: list[tuple[str, Table]]
    ceilings: Table
    dense: Table | None


def overview(readings: Readings) -> Table:
    """A row for each run and batch: ours, and the fastest of the others."""
    header = [
        "run",
        "fastest other",
        "T, tokens",
        "ours, ms",
        "ours, tokens/s",
        "of the roofline",
        "fastest other, ms",
        "its time / ours",
    ]
    rows = []
    for run in readings.runs:
        for i, point in enumerate(_by_tokens(run)):
            rows.append(Row([run.label if i == 0 else "", *_overview_cells(point)]))
    return Table(header, rows, words=2)


def _overview_cells(point: Json) -> list[str]:
    good = correct(point)
    ours = next((c for c in good if c["name"] == OURS), None)
    others = sorted((c for c in good if c["name"] != OURS), key=lambda c: float(c["seconds"]["median"]))
    mine = ["no correct result", NOTHING, NOTHING]
    if ours is not None:
        mine = [number(ours["seconds"]["median"], 1e3), number(ours["tokens_per_s"]), percent(ours["roofline_fraction"])]
    if not others:
        return [NOTHING, str(point["tokens"]), *mine, NOTHING, NOTHING]
    best = others[0]
    ratio = None if ours is None else best["ratio_to_moegen"]
    return [best["name"], str(point["tokens"]), *mine, number(best["seconds"]["median"], 1e3), number(ratio)]


def without_speed(readings: Readings) -> Table | None:
    """Contenders that gave a wrong result or none."""
    rows = [
        Row([run.label, c["name"], c["status"], c["reason"] or NOTHING, str(point["tokens"]), scientific(c["relative_l2"])], "bad")
        for run in readings.runs
        for point in _by_tokens(run)
        for c in point["contenders"]
        if c["status"] != "correct"
    ]
    return Table(["run", "contender", "status", "reason", "T, tokens", "relative L2 error"], rows, words=4) if rows else None


def absent(readings: Readings) -> Table | None:
    """Contenders that were not there, with the reason; runs that say the same share a row."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in readings.runs:
        for one in run.data["absent"]:
            found.setdefault((one["name"], one["reason"]), []).append(run.label)
    everywhere = len(readings.runs)
    rows = [
        Row([name, reason, "all" if len(labels) == everywhere else "; ".join(labels)])
        for (name, reason), labels in sorted(found.items())
    ]
    return Table(["contender", "reason", "runs"], rows, words=3) if rows else None


def scaled(readings: Readings) -> Table | None:
    """Runs whose sizes are not those of the model that they are named after."""
    rows = [Row([run.label, changes(run.data), run.data["scaled"]["why"]]) for run in readings.runs if run.data["scaled"]]
    return Table(["run", "what was scaled", "why"], rows, words=3) if rows else None


def tuning(tunings: Sequence[Tuning]) -> Table | None:
    """A row for each file of tuning records."""
    rows = []
    for one in tunings:
        good = [(t["seconds"], t["trial"]) for t in one.trials if t["status"] == "correct" and t["seconds"]]
        default = one.trials[0]["default_seconds"]
        best, trial = min(good) if good else (None, None)
        cells = [number(default, 1e3), number(best, 1e3), NOTHING if trial is None else str(trial)]
        rows.append(Row([one.label, one.decided or NOTHING, str(len(one.trials)), str(len(good)), *cells]))
    header = ["records", "the best, measured again", "trials", "correct", "default, ms", "best trial, ms", "found at trial"]
    return Table(header, rows, words=2) if rows else None


def run_text(run: Run) -> RunText:
    """All numbers of one run."""
    data, points = run.data, _by_tokens(run)
    return RunText(
        run.label,
        list(_facts(data)),
        f"{changes(data)}: {data['scaled']['why']}" if data["scaled"] else "",
        [(one["name"], one["reason"]) for one in data["absent"]],
        [(_heading(point), _contenders(point)) for point in points],
        _ceilings(points),
        _dense(points),
    )


def _facts(data: Json) -> Iterator[tuple[str, str]]:
    yield "layer", ", ".join(f"{name}={value}" for name, value in data["config"].items() if value is not None)
    yield "threads, routing, seed", f"{data['threads']}, {data['routing']}, {data['seed']}"
    yield "artifact", data["artifact"]
    yield "weights", f"{size(data['weights_bytes'])}, packed {size(data['packed_bytes'])}; library {size(data['library_bytes'])}"
    steps = {"build": "build", "load": "load", "bind": "bind", "first_call": "first call"}
    yield "start, ms", ", ".join(f"{word} {number(data['seconds'][step], 1e3)}" for step, word in steps.items())


def _heading(point: Json) -> str:
    words = [f"T={point['tokens']}", f"{number(point['flops'], 1e-9)} GFLOP", f"{point['active_experts']:g} active experts"]
    words.append(f"{size(int(point['weight_bytes_read']))} of weights read")
    words.append(f"roofline {number(point['roofline_seconds'], 1e3)} ms")
    if point["workspace_bytes"] is not None:
        words.append(f"workspace {size(point['workspace_bytes'])}")
    return ", ".join(words)


def _contenders(point: Json) -> Table:
    """The contenders of one batch: the correct ones by time, then those without a speed."""
    header = ["contender", "status", "median, ms", "p95, ms", "p99, ms", "min, ms", "max, ms", "tokens/s", "GFLOP/s", "GB/s"]
    header += ["of the roofline", "time / ours", "relative L2 error", "calls"]
    good = sorted(correct(point), key=lambda c: float(c["seconds"]["median"]))
    rows = [Row(_contender_cells(c), "ours" if c["name"] == OURS else "") for c in good]
    for c in point["contenders"]:
        if c["status"] != "correct":
            blank = [NOTHING] * (len(header) - 4)
            status = f"{c['status']}: {c['reason']}" if c["reason"] else c["status"]
            rows.append(Row([c["name"], status, *blank, scientific(c["relative_l2"]), NOTHING], "bad"))
    return Table(header, rows, words=2)


def _contender_cells(c: Json) -> list[str]:
    times = [number(c["seconds"][name], 1e3) for name in ("median", "p95", "p99", "min", "max")]
    rates = [number(c["tokens_per_s"]), number(c["flops_per_s"], 1e-9), number(c["bytes_per_s"], 1e-9)]
    ends = [
        percent(c["roofline_fraction"]),
        number(c["ratio_to_moegen"]),
        scientific(c["relative_l2"]),
        NOTHING if c["calls"] is None else f"{c['calls']:,}",
    ]
    return [c["name"], c["status"], *times, *rates, *ends]


def _ceilings(points: Sequence[Json]) -> Table:
    header = [
        "T, tokens",
        "arithmetic",
        "GFLOP/s",
        "GFLOP/s, range",
        "read, GB/s",
        "read, GB/s, range",
        "flops per byte",
        "roofline, ms",
    ]
    rows = []
    for point in points:
        c = point["ceilings"]
        rates = [
            number(c["flops_per_s"], 1e-9),
            _range(c["flops_samples"]),
            number(c["read_bytes_per_s"], 1e-9),
            _range(c["read_samples"]),
        ]
        ends = [number(point["flops"] / point["weight_bytes_read"]), number(point["roofline_seconds"], 1e3)]
        rows.append(Row([str(point["tokens"]), c["kind"], *rates, *ends]))
    return Table(header, rows, words=2)


def _dense(points: Sequence[Json]) -> Table | None:
    rows = [
        Row([d["how"], str(point["tokens"]), number(d["seconds"], 1e3), number(d["measured_ratio"]), number(d["arithmetic_ratio"])])
        for point in points
        if (d := point["dense"])
    ]
    header = ["dense layer", "T, tokens", "dense, ms", "dense time / ours", "dense flops / ours"]
    return Table(header, rows) if rows else None


def _range(samples: Iterable[float]) -> str:
    values = list(samples)
    return f"{number(min(values), 1e-9)} to {number(max(values), 1e-9)}" if values else NOTHING


def _by_tokens(run: Run) -> list[Json]:
    return sorted(run.data["points"], key=lambda point: int(point["tokens"]))
