"""Pictures that set contenders beside one another: tokens per second, ratios to ours, rooflines.

A contender that gave a wrong result, or none, has no point in any of them; a note under the panel says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..bench.contenders.roster import OURS
from . import drawing
from .drawing import INK, MUTED, Axes, Figure, Style
from .readings import Run, correct

Json = Mapping[str, Any]
_KINDS = {"fma": "FMA"}


def throughput(runs: Sequence[Run], known: Mapping[str, Style]) -> Figure:
    """Tokens per second against tokens per call."""
    figure, all_axes = drawing.panels([run.label for run in runs])
    shown: set[str] = set()
    for axes, run in zip(all_axes, runs, strict=True):
        shown |= _plot(axes, run, "tokens_per_s", _tokens, 1, known)
        drawing.token_axis(axes, map(_tokens, run.data["points"]))
        drawing.log_numbers(axes.yaxis)
        axes.set_ylabel("tokens/s")
    drawing.contender_legend(figure, known, shown)
    return figure


def has_ratios(run: Run) -> bool:
    """Whether ours and another contender were correct at the same point."""
    return any(_comparable(point, contender) for point in run.data["points"] for contender in correct(point))


def ratio(runs: Sequence[Run], known: Mapping[str, Style]) -> Figure:
    """Each other contender's time divided by ours, against tokens per call; there is no ratio to a wrong result."""
    figure, all_axes = drawing.panels([run.label for run in runs])
    shown = {OURS} & set(known)
    for axes, run in zip(all_axes, runs, strict=True):
        shown |= _plot(axes, run, "ratio_to_moegen", _tokens, 1, known, _comparable)
        drawing.token_axis(axes, map(_tokens, run.data["points"]))
        axes.axhline(1, color=known[OURS].colour if OURS in known else INK, linewidth=2.8, zorder=4)
        drawing.log_numbers(axes.yaxis, at_least=(0.8, 1.6))
        axes.axhspan(axes.get_ylim()[0], 1, color="#f1f1f1", zorder=0)
        axes.set_ylabel("time / our time")
    drawing.contender_legend(figure, known, shown)
    return figure


def roofline(runs: Sequence[Run], known: Mapping[str, Style]) -> Figure:
    """GFLOP/s against flops per byte of weights, under the ceilings that were measured."""
    figure, all_axes = drawing.panels([run.label for run in runs], inches=(5.4, 4.3))
    shown: set[str] = set()
    for axes, run in zip(all_axes, runs, strict=True):
        axes.set(xscale="log", ylabel="GFLOP/s", xlabel="flops per byte of weights read")
        low, high, roof = _ceilings(axes, run.data["points"])
        shown |= _plot(axes, run, "flops_per_s", _intensity, 1e-9, known)
        drawing.log_numbers(axes.yaxis, at_least=(roof, roof * 1.3))
        drawing.plain_numbers(axes.xaxis)
        _token_marks(axes, run.data["points"], low, high)
    drawing.contender_legend(figure, known, shown)
    return figure


# ---------------------------------------------------------------- lines


def _tokens(point: Json) -> int:
    return int(point["tokens"])


def _intensity(point: Json) -> float:
    return float(point["flops"] / point["weight_bytes_read"])


def _comparable(point: Json, contender: Json) -> bool:
    return contender["name"] != OURS and any(c["name"] == OURS for c in correct(point))


def _plot(
    axes: Axes,
    run: Run,
    value: str,
    place: Callable[[Json], float],
    scale: float,
    known: Mapping[str, Style],
    keep: Callable[[Json, Json], bool] = lambda point, contender: True,
) -> set[str]:
    """A line for each contender through the points at which it was correct; returns who has one."""
    points = sorted(run.data["points"], key=_tokens)
    lines: dict[str, list[float]] = {}
    for i, point in enumerate(points):
        for contender in correct(point):
            if contender[value] is not None and contender[value] > 0 and keep(point, contender):
                lines.setdefault(contender["name"], [math.nan] * len(points))[i] = contender[value] * scale  # NaN: a gap
    for name in known:
        if name in lines:
            axes.plot([place(point) for point in points], lines[name], **known[name].line())
    if not lines:
        drawing.remark(axes, "no correct result", (0.5, 0.5), (0, 0), "axes fraction", boxed=True, ha="center", color=MUTED)
    drawing.note(axes, _without_speed(run))
    return set(lines)


def _without_speed(run: Run) -> str:
    """Who is not shown, and why: "No speed shown: a wrong at T=16; b failed"."""
    bad: dict[tuple[str, str], list[int]] = {}
    for point in run.data["points"]:
        for contender in point["contenders"]:
            if contender["status"] != "correct":
                bad.setdefault((contender["name"], contender["status"]), []).append(_tokens(point))
    everywhere = len(run.data["points"])
    words = [
        f"{drawing.brief(name)} {status}" + ("" if len(at) == everywhere else f" at T={', '.join(map(str, sorted(at)))}")
        for (name, status), at in sorted(bad.items())
    ]
    return f"No speed shown: {'; '.join(words)}" if words else ""


# ---------------------------------------------------------------- rooflines


def _ceilings(axes: Axes, points: Sequence[Json]) -> tuple[float, float, float]:
    """Both ceilings as one bent line in the band of their range; returns the ends of the x axis and the highest rate."""
    rates = [point["ceilings"]["flops_per_s"] / 1e9 for point in points]
    reads = [point["ceilings"]["read_bytes_per_s"] / 1e9 for point in points]
    rate, read = statistics.median(rates), statistics.median(reads)
    places = [_intensity(point) for point in points]
    low, high = min(*places, rate / read) / 4, max(*places, rate / read) * 2.5
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    lowest, highest = ([min(pick(rates), pick(reads) * x) for x in steps] for pick in (min, max))
    axes.fill_between(steps, lowest, highest, color="#cfcfcf", linewidth=0, zorder=1.5)
    axes.plot(steps, [min(rate, read * x) for x in steps], color=INK, linewidth=1.5, zorder=3)
    kind = points[0]["ceilings"]["kind"]
    label = f"{drawing.short(rate)} GFLOP/s {_KINDS.get(kind, kind)}"
    drawing.remark(axes, label, (high, max(rates)), (-3, 3), ha="right", va="bottom", fontsize=8.5)
    start = low * 1.15
    drawing.remark_along(axes, f"{drawing.short(read)} GB/s read", (start, max(reads) * start), (-2, 4), fontsize=8.5)
    axes.set_xlim(low, high)
    return low, high, max(rates)


def _token_marks(axes: Axes, points: Sequence[Json], low: float, high: float) -> None:
    """Over the panel, which intensity belongs to how many tokens."""
    marks = sorted((_intensity(point), _tokens(point)) for point in points)
    places = [place for place, _ in marks]
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, drawing.thinned(places, [str(tokens) for _, tokens in marks], low, high), fontsize=8)
    top.tick_params(length=3, color="#9a9a9a")
    top.minorticks_off()
    top.spines["top"].set_visible(False)
    top.set_xlabel("tokens per call (T)", fontsize=8.5, color=MUTED)
