"""Pictures of our own layer: the parts of a call, tokens per expert, tuning."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench.contenders.roster import OURS
from ..display import duration, time_unit
from . import drawing
from .drawing import INK, MUTED, OURS_COLOUR, Axes, Figure
from .readings import Run, Tuning, correct

Json = Mapping[str, Any]

_PARTS = {
    "router": "#332288",
    "topk": "#88ccee",
    "dispatch": "#44aa99",
    "gather": "#117733",
    "up": "#e3cf7a",
    "down": "#cc6677",
    "finish": "#aa4499",
}
_OTHER_PARTS = ("#999933", "#0072b2", "#7a7a7a")
_REST, _REST_COLOUR = "in no part", "#dcdcdc"
_BAR = "#5b84b1"


def parts(runs: Sequence[Run]) -> Figure:
    """Stacked bars: the share that each part has in a call."""
    names = _part_names(runs)
    figure, all_axes = drawing.panels([run.label for run in runs], title_points=28)
    for axes, run in zip(all_axes, runs, strict=True):
        points = sorted((p for p in run.data["points"] if p["parts"]), key=lambda p: int(p["tokens"]))
        small = 8.5 if len(points) <= 9 else 7.0
        for place, point in enumerate(points):
            _bar(axes, place, point, names, small)
        axes.set_xticks(range(len(points)), [str(point["tokens"]) for point in points], fontsize=small)
        margin = max(0.0, 4 - len(points)) / 2  # few bars stay slim
        axes.set(xlim=(-0.6 - margin, len(points) - 0.4 + margin), ylim=(0, 100))
        axes.set(xlabel="tokens per call (T)", ylabel="share of the call, %")
        axes.grid(False, axis="x")
    drawing.legend(figure, [drawing.Patch(color=colour, label=name) for name, colour in names.items()])
    return figure


def _part_names(runs: Sequence[Run]) -> dict[str, str]:
    """Every part of the runs and its colour, in the order in which the bars stack them."""
    found = {name for run in runs for point in run.data["points"] for name in point["parts"] or ()}
    others = zip(sorted(found - set(_PARTS)), itertools.cycle(_OTHER_PARTS), strict=False)
    return {**{name: colour for name, colour in _PARTS.items() if name in found}, **dict(others), _REST: _REST_COLOUR}


def _bar(axes: Axes, place: int, point: Json, names: Mapping[str, str], small: float) -> None:
    """One bar, the first part on top, under the median time of a call; what the parts lack of it is in none of them."""
    median = next((c["seconds"]["median"] for c in correct(point) if c["name"] == OURS), 0.0)
    inside = sum(point["parts"].values())
    total = max(median, inside)
    seconds = {**point["parts"], _REST: total - inside}
    height = 100.0
    for name, colour in names.items():
        share = 100 * seconds.get(name, 0.0) / total if total > 0 else 0.0
        height -= share
        axes.bar(place, share, bottom=height, width=0.8, color=colour, edgecolor="white", linewidth=0.6 if share > 1 else 0)
        if share >= 6:
            ink = drawing.ink_on(colour)
            axes.text(place, height + share / 2, f"{share:.0f}", ha="center", va="center_baseline", fontsize=small, color=ink)
    said = duration(median or inside).replace(" ", "\n")
    drawing.remark(axes, said, (place, 100), (0, 3), ha="center", fontsize=small, color=MUTED)


# ---------------------------------------------------------------- tokens per expert


def load(runs: Sequence[Run]) -> Figure:
    """Bars of the tokens of each expert, the routings of one layer side by side and on one scale."""
    layers = _layers(runs)
    panels = [(layer, routing) for layer, routings in layers.items() for routing in routings]
    figure, all_axes = drawing.panels([f"{layer}, {routing}" for layer, routing in panels], inches=(5.4, 3.1))
    for axes, (layer, routing) in zip(all_axes, panels, strict=True):
        top = max(max(point["expert_load"]) for point in layers[layer].values())
        _load_panel(axes, layers[layer][routing], top)
    return figure


def _layers(runs: Sequence[Run]) -> dict[str, dict[str, Json]]:
    """Layer -> routing -> the point with most tokens; neither threads nor the dtype decide who goes where."""
    layers: dict[str, dict[str, Json]] = {}
    for run in runs:
        points = [point for point in run.data["points"] if point["expert_load"]]
        if points:
            sizes = f"E={run.data['config']['experts']} K={run.data['config']['top_k']}"
            layer = f"{run.data['preset']} {sizes}" if run.data["preset"] else sizes
            layers.setdefault(layer, {}).setdefault(run.data["routing"], max(points, key=lambda p: int(p["tokens"])))
    return layers


def _load_panel(axes: Axes, point: Json, top: int) -> None:
    counts = sorted(point["expert_load"], reverse=True)
    mean = sum(counts) / len(counts)
    axes.bar(range(len(counts)), counts, width=0.82 if len(counts) <= 128 else 1.0, color=_BAR, linewidth=0)
    axes.axhline(mean, color=INK, linewidth=1.4)
    idle = sum(count == 0 for count in counts)
    said = f"busiest {counts[0]} ({counts[0] / mean:.1f}x the mean)" if mean else "no tokens"
    said += f"\n{idle} of {len(counts)} experts idle" if idle else ""
    drawing.remark(axes, said, (1, 1), (-2, -2), within="axes fraction", ha="right", va="top", fontsize=8.5, boxed=True)
    drawing.remark(axes, f"mean {mean:.3g}", (len(counts) - 0.5, mean), (0, 4), ha="right", fontsize=8.5)
    axes.set(xlim=(-0.8, len(counts) - 0.2), ylim=(0, max(top, 1) * 1.3), xticks=[])
    axes.set(xlabel=f"experts, busiest first (T={point['tokens']})", ylabel="tokens, all batches")
    axes.grid(False, axis="x")


# ---------------------------------------------------------------- tuning


def tuning(tunings: Sequence[Tuning]) -> Figure:
    """Best time so far against the trial, beside the time of the default."""
    figure, all_axes = drawing.panels([one.label for one in tunings])
    for axes, one in zip(all_axes, tunings, strict=True):
        _tuning_panel(axes, one)
    return figure


def _tuning_panel(axes: Axes, one: Tuning) -> None:
    trials = one.trials
    good = [(t["trial"], t["seconds"]) for t in trials if t["status"] == "correct" and t["seconds"]]
    default, last = trials[0]["default_seconds"], trials[-1]["trial"]
    factor, unit = time_unit(default)
    default *= factor
    best = _best_so_far(axes, [(trial, seconds * factor) for trial, seconds in good], last) if good else default
    axes.axhline(default, color=INK, linestyle=(0, (5, 3)), linewidth=1.3, zorder=2.5)
    axes.set(xlabel="trial", ylabel=f"time, {unit}", xlim=(-0.5, max(last, 1) + 0.5))
    drawing.whole_numbers(axes.xaxis)
    drawing.log_numbers(axes.yaxis, at_least=(min(best, default) / 1.2, default * 1.3))
    beside: dict[str, Any] = {"within": ("axes fraction", "data"), "ha": "right", "fontsize": 8.5, "boxed": True, "zorder": 4}
    drawing.remark(axes, f"default {default:.3g} {unit}", (1, default), (-2, 4), **beside)
    if good:
        drawing.remark(axes, f"best trial {best:.3g} {unit}", (1, best), (-2, -5), va="top", color="#b23a06", **beside)
    counts = Counter(str(t["status"]) for t in trials)
    tried = f"{len(trials)} trial{'s' * (len(trials) != 1)}: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    drawing.note(axes, f"{tried}. The best, measured again: {one.decided}." if one.decided else f"{tried}.")


def _best_so_far(axes: Axes, good: Sequence[tuple[int, float]], last: int) -> float:
    """Each time as a dot and the best so far as steps, up to the last trial; returns the best of all."""
    places, times = zip(*good, strict=True)
    best = list(itertools.accumulate(times, min))
    axes.scatter(places, times, s=11, color="#9bb3cf", linewidths=0, zorder=2)
    axes.step([*places, last], [*best, best[-1]], where="post", color=OURS_COLOUR, linewidth=2.4, zorder=3)
    return float(best[-1])
