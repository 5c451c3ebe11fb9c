"""The picture of `ExpertLoad`: which experts work, how evenly over time, and in which layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..display import number, percent
from ..monitoring import ExpertLoad
from ..monitoring.counts import LayerCounts
from ..monitoring.measures import Summary, evenness
from . import drawing
from .drawing import INK, MUTED, OURS_COLOUR, Axes, Figure
from .tables import Row, Table

_BAR, _OTHERS = "#5b84b1", "#b9c6d6"
_FEW_LAYERS = 8
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


class Known(NamedTuple):
    """A layer's counts and what follows from them."""

    counts: LayerCounts
    summary: Summary

    @property
    def label(self) -> str:
        return f"layer {self.summary.layer}"


def known(load: ExpertLoad) -> list[Known]:
    """The layers of a load, in their order."""
    snapshots = [(name, load.snapshot(name)) for name in load.layers]
    return [Known(counts, counts.summary(name)) for name, counts in snapshots]


def figure(load: ExpertLoad) -> Figure:
    """Bars of a layer's experts, evenness over time and, of several layers, a heat map and the two extremes."""
    layers = known(load)
    if not layers:
        made, (axes,) = drawing.panels(["choices per expert"])
        _nothing(axes)
        return made
    ordered = sorted(layers, key=lambda layer: layer.summary.evenness if layer.summary.evenness is not None else 2.0)
    shown = [(ordered[0], "")] if len(layers) == 1 else [(ordered[0], ", the least even"), (ordered[-1], ", the most even")]
    titles = [f"choices per expert, {layer.label}{words}" for layer, words in shown] + ["evenness over time"]
    made, panels = drawing.panels(titles if len(layers) == 1 else [*titles, "choices over the layer's mean"], inches=(5.6, 3.6))
    for axes, (layer, _) in zip(panels, shown, strict=False):
        _bars(axes, layer)
    _over_time(panels[len(shown)], layers)
    if len(layers) > 1:
        _heat(made, panels[-1], layers)
    return made


def table(load: ExpertLoad) -> Table:
    """A row for each layer."""
    header = ["layer", "experts", "calls", "tokens", "choices", "entropy, bits", "evenness", "busiest / mean"]
    header += ["variation", "Gini", "dead experts", "dropped"]
    return Table(header, [Row(_cells(layer.summary)) for layer in known(load)])


def _cells(s: Summary) -> list[str]:
    uneven = [number(value) for value in (s.entropy_bits, s.evenness, s.imbalance, s.variation, s.gini)]
    dropped = f"{s.dropped:,} ({percent(s.dropped / s.choices)})" if s.choices and s.dropped else f"{s.dropped:,}"
    return [s.layer, str(s.experts), f"{s.calls:,}", f"{s.tokens:,}", f"{s.choices:,}", *uneven, str(len(s.dead)), dropped]


# ---------------------------------------------------------------- panels


def _bars(axes: Axes, layer: Known) -> None:
    counts, summary = layer.counts.counts, layer.summary
    experts = len(counts)
    axes.set(xlabel="expert", ylabel="choices", xlim=(-0.8, experts - 0.2))
    axes.grid(False, axis="x")
    if summary.imbalance is None:
        _nothing(axes)
        return
    mean = counts.sum() / experts
    colours = [OURS_COLOUR if expert == summary.busiest else _BAR for expert in range(experts)]
    axes.bar(range(experts), counts, width=0.82 if experts <= 128 else 1.0, color=colours, linewidth=0)
    axes.axhline(mean, color=INK, linewidth=1.2)
    said = f"line: mean, {drawing.short(mean)}\nbusiest: expert {summary.busiest}, {summary.imbalance:.2f}x the mean"
    said += f"\n{len(summary.dead)} of {experts} experts dead" if summary.dead else ""
    drawing.remark(axes, said, (1, 1), (-2, -2), within="axes fraction", ha="right", va="top", fontsize=8.5, boxed=True)
    axes.set_ylim(0, counts.max() * 1.35)  # room for what is said
    _expert_axis(axes, experts)
    drawing.linear_numbers(axes.yaxis)


def _over_time(axes: Axes, layers: list[Known]) -> None:
    """A line for each layer; of many layers, the mean and the extremes stand out."""
    lines = [line for layer in layers if (line := _evenness(layer)) is not None]
    axes.set(ylabel="entropy / largest possible", xlabel="time")
    if not lines:
        _nothing(axes)
        return
    start, end = min(line[1][0] for line in lines), max(line[1][-1] for line in lines)
    scale, unit = next(((s, name) for s, name in _UNITS if end - start >= 2 * s), (1e-3, "milliseconds"))
    few = len(lines) <= _FEW_LAYERS
    styles = drawing.styles(label for label, _, _ in lines)
    for label, seconds, values in lines:
        look = styles[label]
        marker = look.marker if few else "" if len(seconds) > 1 else "."
        colour = look.colour if few else _OTHERS
        axes.plot((seconds - start) / scale, values, color=colour, marker=marker, markersize=3.5, linewidth=1.4 if few else 0.9)
    if few and len(lines) > 1:
        axes.legend([label for label, _, _ in lines], fontsize=8, ncols=2, loc="lower left")
    low = min(float(values.min()) for _, _, values in lines)
    axes.set_ylim(max(0.0, min(low - 0.25 * (1.02 - low), 0.9)), 1.02)
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.set_xlabel(f"{unit} since the first call")
    if not few:
        drawing.note(axes, f"A line for each of {len(lines)} layers.")


def _evenness(layer: Known) -> tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """(label, ends of the stretches in seconds, evenness in each)."""
    found = [(seconds, evenness(counts)) for seconds, counts in layer.counts.intervals()]
    good = [(seconds, value) for seconds, value in found if value is not None]
    if not good:
        return None
    return layer.label, np.array([seconds for seconds, _ in good]), np.array([value for _, value in good])


def _heat(made: Figure, axes: Axes, layers: list[Known]) -> None:
    """Layers from top to bottom, experts from left to right; layers with fewer experts end earlier."""
    widest = max(layer.counts.experts for layer in layers)
    values = np.full((len(layers), widest), np.nan)
    for row, layer in enumerate(layers):
        counts = layer.counts.counts
        if counts.any():
            values[row, : len(counts)] = counts / counts.mean()
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=drawing.heat_colours(), vmin=0, vmax=max(top, 1.0))
    bar = made.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    axes.grid(False)
    step = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [layers[row].summary.layer for row in range(0, len(layers), step)], fontsize=8)
    axes.set(xlabel="expert", ylabel="layer")
    _expert_axis(axes, widest)


def _expert_axis(axes: Axes, experts: int) -> None:
    if experts <= 16:
        axes.set_xticks(range(experts))
    else:
        drawing.whole_numbers(axes.xaxis)


def _nothing(axes: Axes) -> None:
    drawing.remark(axes, "nothing was counted", (0.5, 0.5), (0, 0), "axes fraction", ha="center", color=MUTED)
    axes.set(xticks=[], yticks=[])
