"""The results as Markdown: what was checked, a table for every layer, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..display import duration, percent, scientific
from .targets import target

OURS = "moegen"
_GOAL_DEVICE = "H200"


def markdown(document: Mapping[str, Any]) -> str:
    """The whole document as text."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    around = document["surroundings"]
    device, packages = around["device"], around["packages"]
    yield f"# moegen on {device.get('name', 'an unknown device')}, {document['started']}"
    yield ""
    yield f"Driver {device.get('driver_version', 'unknown')}; " + ", ".join(f"{n} {v}" for n, v in packages.items() if v) + "."
    if ceilings := limits(document["cells"]):
        yield (
            f"Ceilings measured in the run: {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s (bf16, cuBLAS), "
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s (copy, read and written)."
        )
    yield ""
    yield from _checks(document["checks"])
    for layer in dict.fromkeys(cell["layer"] for cell in document["cells"]):
        yield from _layer(layer, [cell for cell in document["cells"] if cell["layer"] == layer], device.get("name", ""))
    if document["left_out"]:
        yield "## Left out"
        yield ""
        yield from (f"* {entry['what']}: {entry['why']}" for entry in document["left_out"])
        yield ""
    yield "Medians of CUDA-graph replays over several batches; ratios are to moegen's time in the same round, with quartiles."
    yield "`cublas-loop` knows the experts' counts beforehand, which a layer does not."


def _checks(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not checks:
        return
    yield "| check | result | seconds | |"
    yield "|---|---|---:|---|"
    for check in checks:
        yield f"| {check['name']} | {check['status']} | {check['seconds']} | {_cell(check['why'])} |"
    yield ""


def limits(cells: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The best ceilings met in all cells."""
    met = [sample for cell in cells for sample in cell.get("ceilings", ())]
    return {name: max(sample[name] for sample in met) for name in ("flops_per_s", "bytes_per_s")} if met else None


def roofline(cell: Mapping[str, Any]) -> float | None:
    """Seconds that the cell's work takes at the ceilings met around it."""
    met, work = limits([cell]), cell["work"]
    return max(work["flops"] / met["flops_per_s"], work["bytes"] / met["bytes_per_s"]) if met else None


def standing(cell: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A contender's entry in a cell."""
    return next((entry for entry in cell["contenders"] if entry["name"] == name), None)


def _layer(layer: str, cells: Sequence[Mapping[str, Any]], device: str) -> Iterator[str]:
    rivals = [name for name in dict.fromkeys(entry["name"] for cell in cells for entry in cell["contenders"]) if name != OURS]
    yield f"## {layer}"
    yield ""
    yield f"| T | routing | moegen | launches | roofline | of it | aim | match | {' | '.join(f'{name} /' for name in rivals)} |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(rivals)
    for cell in sorted(cells, key=lambda one: (one["routing"], one["tokens"])):
        yield "| " + " | ".join(_row(cell, rivals, device)) + " |"
    yield ""
    for cell in cells:
        for entry in cell["contenders"]:
            if entry["status"] != "correct":
                yield f"* T={cell['tokens']}, {cell['routing']}: {entry['name']} {entry['status']}: {entry['reason']}"
    errors = [
        entry["relative_l2"] for cell in cells for entry in cell["contenders"] if entry["name"] == OURS and entry["relative_l2"]
    ]
    if errors:
        yield f"* moegen's largest relative L2 error: {scientific(max(errors))}"
    yield ""


def _row(cell: Mapping[str, Any], rivals: Sequence[str], device: str) -> Iterator[str]:
    ours, limit = standing(cell, OURS), roofline(cell)
    seconds = ours["seconds"] if ours else None
    launches = ours["launches"] if ours else None
    aim = target(cell["layer"], cell["tokens"]) if cell["routing"] == "uniform" and _GOAL_DEVICE in device else None
    yield str(cell["tokens"])
    yield str(cell["routing"])
    yield _spread(seconds, duration) if seconds else (ours["status"] if ours else "absent")
    yield f"{sum(launches.values()):.0f}" if launches else ""
    yield duration(limit) if limit else ""
    yield percent(limit / seconds["median"]) if limit and seconds else ""
    yield duration(aim.ours) if aim else ""
    yield duration(aim.match) if aim else ""
    for name in rivals:
        entry = standing(cell, name)
        if entry is None:
            yield ""
        elif entry["ratio"]:
            yield _spread(entry["ratio"], lambda ratio: f"{ratio:.2f}") + ("" if entry["mode"] == "graph" else " eager")
        else:
            yield duration(entry["seconds"]["median"]) if entry["seconds"] else entry["status"]


def _spread(found: Mapping[str, float], text: Any) -> str:
    return f"{text(found['median'])} ({text(found['low'])}..{text(found['high'])})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def closing(document: Mapping[str, Any]) -> str:
    """What a terminal shows last: a line for each cell."""
    lines = []
    for cell in document["cells"]:
        ours = standing(cell, OURS)
        ratios = ", ".join(
            f"{e['name']} {e['ratio']['median']:.2f}" for e in cell["contenders"] if e["name"] != OURS and e["ratio"]
        )
        time = (
            duration(ours["seconds"]["median"])
            if ours and ours["seconds"]
            else f"{ours['status']}: {ours['reason']}"
            if ours
            else "absent"
        )
        lines.append(f"{cell['layer']:14} T={cell['tokens']:<6}{cell['routing']:8} {time:>10}  {ratios}")
    return "\n".join(lines)
