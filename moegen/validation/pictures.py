"""The pictures of a validation: errors beside their bounds, ratios with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import drawing
from ..report.drawing import INK, MUTED, OURS_COLOUR, Axes, Figure
from ..report.pictures import Picture
from .claims import LEAST_RATIO

Json = Mapping[str, Any]

_GOOD, _BAD = "#4c7fb8", OURS_COLOUR
RATIOS = (
    "Another contender's time over ours, in quiet rounds: the median and its interval. Right of the line ours is faster; a claim "
    "holds when no interval of its contenders touches the line."
)
ERRORS = (
    "Errors of every case of the proof against the float64 reference, by kind of routing, as shares of what is allowed: right of "
    "the line is too large."
)


def draw(document: Json) -> list[Picture]:
    """Those that there is something for."""
    made = []
    if any(layer["ratios"] for layer in document["layers"]):
        made.append(Picture("ratios.png", "Beside NumPy and torch", RATIOS, drawing.png(ratios(document["layers"]))))
    if any(layer["proof"] for layer in document["layers"]):
        made.append(Picture("errors.png", "Errors", ERRORS, drawing.png(errors(document["layers"]))))
    return made


def ratios(layers: Sequence[Json]) -> Figure:
    """A panel for each layer and number of tokens, an interval for each contender."""
    panels = [(layer, tokens) for layer in layers for tokens in dict.fromkeys(r["tokens"] for r in layer["ratios"])]
    figure, all_axes = drawing.panels([f"{layer['label']}, T={tokens}" for layer, tokens in panels], inches=(5.4, 2.5))
    for axes, (layer, tokens) in zip(all_axes, panels, strict=True):
        _intervals(axes, sorted((r for r in layer["ratios"] if r["tokens"] == tokens), key=lambda r: -float(r["median"])))
    return figure


def _intervals(axes: Axes, rows: Sequence[Json]) -> None:
    for place, row in enumerate(rows):
        colour = _GOOD if row["low"] > LEAST_RATIO else _BAD
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=3.2, solid_capstyle="butt")
        axes.plot([row["median"]], [place], marker="o", markersize=6, color=colour, markeredgecolor="white")
        drawing.remark(axes, f"{row['median']:.2f}", (row["high"], place), (5, 0), va="center", fontsize=8, color=MUTED)
    axes.axvline(LEAST_RATIO, color=INK, linewidth=1.2)
    low, high = min(0.8, *(r["low"] for r in rows)), max(1.5, *(r["high"] for r in rows))
    axes.set(xscale="log", xlim=(low / 1.1, high * (high / low) ** 0.12), ylim=(-0.6, len(rows) - 0.4), xlabel="time / our time")
    axes.set_yticks(range(len(rows)), [r["contender"] for r in rows])
    drawing.log_ticks(axes.xaxis)
    axes.grid(False, axis="y")


def errors(layers: Sequence[Json]) -> Figure:
    """A panel for each layer, a row for each kind of routing, a dot for each case and both kinds of error."""
    proven = [layer for layer in layers if layer["proof"]]
    figure, all_axes = drawing.panels([layer["label"] for layer in proven], inches=(5.4, 2.6))
    for axes, layer in zip(all_axes, proven, strict=True):
        _errors(axes, layer["proof"])
    handles = [drawing.Patch(color=_GOOD, label="relative L2"), drawing.Patch(color="#8a8a8a", label="elementwise")]
    drawing.legend(figure, handles)
    return figure


def _errors(axes: Axes, proof: Json) -> None:
    kinds = list(dict.fromkeys(case["routing"] for case in proof["cases"]))
    least = 1.0
    for name, colour, off in (("relative_l2", _GOOD, 0.13), ("elementwise", "#8a8a8a", -0.13)):
        bound = proof["bounds"][name]
        points = [(case[name] / bound, kinds.index(case["routing"]) + off) for case in proof["cases"] if case[name]]
        least = min([least, *(share for share, _ in points)])
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=4.5, alpha=0.75, markeredgewidth=0)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set(xscale="log", xlim=(least / 1.5, 3), ylim=(-0.6, len(kinds) - 0.4), xlabel="error / largest error that passes")
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    drawing.log_ticks(axes.xaxis)
    axes.grid(False, axis="y")
