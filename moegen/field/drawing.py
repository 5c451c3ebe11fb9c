"""Two pictures: how much of the roofline each layer reaches, and what others take in comparison. Needs matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .summary import OURS, roofline, standing

_COLOURS = ("#d7480b", "#332288", "#44aa99", "#aa4499", "#117733", "#999933", "#882255", "#0072b2")


def draw(document: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes the pictures; returns their names."""
    cells = [cell for cell in document["cells"] if cell["routing"] == "uniform"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    if not layers:
        return []
    device = document["surroundings"]["device"].get("name", "")
    made = []
    for name, title, fill in (
        ("roofline.png", "share of the roofline", _shares),
        ("ratios.png", "time relative to moegen's (above 1: slower)", _ratios),
    ):
        figure = Figure(figsize=(4.2 * len(layers), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        for index, layer in enumerate(layers):
            axes = figure.add_subplot(1, len(layers), index + 1)
            fill(axes, sorted((cell for cell in cells if cell["layer"] == layer), key=lambda cell: cell["tokens"]))
            axes.set_xscale("log", base=2)
            axes.set_title(layer, fontsize=10)
            axes.set_xlabel("tokens")
            axes.grid(color="#e4e4e4")
        figure.suptitle(f"{title}; {device}, uniform routing", fontsize=11)
        figure.axes[-1].legend(frameon=False, fontsize=7)
        figure.savefig(folder / name, dpi=130)
        made.append(name)
    return made


def _shares(axes: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    for colour, name in zip(_COLOURS, _names(cells), strict=False):
        points = [
            (cell["tokens"], limit / entry["seconds"]["median"])
            for cell in cells
            if (entry := standing(cell, name)) and entry["seconds"] and (limit := roofline(cell))
        ]
        _line(axes, points, colour, name)
    axes.set_ylim(0, 1.05)


def _ratios(axes: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    axes.axhline(1.0, color=_COLOURS[0], linewidth=1.5)
    for colour, name in zip(_COLOURS[1:], [name for name in _names(cells) if name != OURS], strict=False):
        found = [(cell["tokens"], entry["ratio"]) for cell in cells if (entry := standing(cell, name)) and entry["ratio"]]
        _line(axes, [(tokens, ratio["median"]) for tokens, ratio in found], colour, name)
        axes.fill_between(
            [t for t, _ in found], [r["low"] for _, r in found], [r["high"] for _, r in found], color=colour, alpha=0.2
        )
    axes.set_yscale("log", base=2)


def _line(axes: Any, points: Sequence[tuple[float, float]], colour: str, name: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name)


def _names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(entry["name"] for cell in cells for entry in cell["contenders"])
    return sorted(names, key=lambda name: name != OURS)
