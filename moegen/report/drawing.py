"""What the pictures have in common: colours, panels, axes, legends. The only module that knows matplotlib."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..bench.contenders.roster import OURS
from ..errors import without_pictures

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
    from matplotlib.transforms import offset_copy
    from PIL import Image  # a part of what matplotlib needs
except ModuleNotFoundError as error:
    raise without_pictures(error) from None

__all__ = ["Axes", "Figure", "Patch"]  # for those that draw on what this module makes

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
PANEL_INCHES = (5.4, 3.9)
DOTS_PER_INCH = 144

# Paul Tol's muted scheme, told apart with every kind of colour vision; vermilion is ours alone.
OURS_COLOUR = "#d7480b"
_OURS_COLOURS = (OURS_COLOUR, "#f0a35e", "#8c2d04")
_PEER_COLOURS = ("#332288", "#44aa99", "#aa4499", "#88ccee", "#117733", "#999933", "#882255", "#0072b2", "#c9b458", "#7a7a7a")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))

_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


class Style(NamedTuple):
    """How a contender is drawn, in every picture of a report."""

    colour: str
    marker: str
    dash: Any
    width: float
    size: float
    height: int

    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "linewidth": self.width,
            "markersize": self.size,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": self.height,
        }


def is_ours(name: str) -> bool:
    return name.split()[0].split("_")[0].split("-")[0] == OURS if name.strip() else False


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each contender, ours first; the same names get the same styles."""
    ordered = sorted(set(names), key=lambda name: (not is_ours(name), name != OURS, name))
    ours = [name for name in ordered if is_ours(name)]
    made = {name: Style(_OURS_COLOURS[i % 3], "o", _DASHES[i % 3], 2.8, 8.5, 10) for i, name in enumerate(ours)}
    for i, name in enumerate(ordered[len(ours) :]):
        dash = _DASHES[i // len(_PEER_COLOURS) % len(_DASHES)]
        marker = _MARKERS[i % len(_MARKERS)]
        made[name] = Style(_PEER_COLOURS[i % len(_PEER_COLOURS)], marker, dash, 1.4, 8.5 if marker in "PX*" else 6, 5)
    return made


def panels(titles: Sequence[str], inches: tuple[float, float] = PANEL_INCHES, title_points: float = 8) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel for each of `titles`, left to right, then down.

    Args:
        inches: width and height of a panel.
        title_points: distance of the titles from the panels.
    """
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(
            figsize=(inches[0] * columns, inches[1] * rows),
            facecolor="white",
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
    flat = [axes for row in grid for axes in row]
    for axes in flat[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(flat, titles, strict=False):
        axes.set_title(wrapped(title, int(inches[0] * 10)), loc="left", fontsize=10.5, fontweight="bold", pad=title_points)
        axes.tick_params(length=0)
    return figure, flat[: len(titles)]


def png(figure: Figure) -> bytes:
    """The figure as a PNG of few colours, which depends on nothing but what is drawn."""
    with matplotlib.rc_context(_SETTINGS):
        figure.set_dpi(DOTS_PER_INCH)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    stream = io.BytesIO()
    drawn.quantize(128, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def token_axis(axes: Axes, tokens: Iterable[int]) -> None:
    """A logarithmic axis whose ticks are the token counts that were measured."""
    counts = sorted(set(tokens))
    axes.set_xscale("log", base=2)
    low, high = (counts[0] / 1.5, counts[-1] * 1.5) if len(counts) > 1 else (counts[0] / 4, counts[0] * 4)
    axes.set_xlim(low, high)
    axes.set_xticks(counts, thinned(counts, [str(count) for count in counts], low, high))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens per call (T)")


def thinned(places: Sequence[float], labels: Sequence[str], low: float, high: float) -> list[str]:
    """The labels of a logarithmic axis, blank where one would touch its neighbour; the last is always kept."""
    where = [math.log(place / low) / math.log(high / low) for place in places]
    half = [0.009 * len(label) + 0.006 for label in labels]  # of the axis of a panel, in the common font size
    kept = [len(labels) - 1]
    taken = -math.inf
    for i in range(len(labels) - 1):
        if where[i] - half[i] >= taken and where[i] + half[i] <= where[-1] - half[-1]:
            kept.append(i)
            taken = where[i] + half[i]
    return [label if i in kept else "" for i, label in enumerate(labels)]


def whole_numbers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(8, integer=True))


def linear_numbers(axis: Axis) -> None:
    """Ticks of a linear axis from zero as 500, 20k or 1.5M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def heat_colours() -> Any:
    """White for nothing to dark for most; what is not there is grey."""
    return matplotlib.colormaps["YlGnBu"].with_extremes(bad="#e9e9e9")


def plain_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis as 0.5, 20 or 30k rather than powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(NullLocator())


def log_numbers(axis: Axis, at_least: tuple[float, float] | None = None) -> None:
    """A logarithmic y axis around all that is drawn, with three to nine numbers on it.

    Args:
        at_least: values that the axis has to hold.
    """
    axes = axis.axes
    axes.set_yscale("log")
    axes.autoscale_view()
    low, high = axes.dataLim.intervaly
    if not 0 < low <= high < math.inf:
        low, high = 0.5, 2.0
    if at_least is not None:
        low, high = min(low, at_least[0]), max(high, at_least[1])
    margin = max((high / low) ** 0.07, 1.12)
    low, high = low / margin, high * margin
    axes.set_ylim(low, high)
    axis.set_major_locator(FixedLocator(_round_numbers(low, high)))
    plain_numbers(axis)


def log_ticks(axis: Axis) -> None:
    """Round numbers on a logarithmic axis whose limits are set."""
    axis.set_major_locator(FixedLocator(_round_numbers(*axis.get_view_interval())))
    plain_numbers(axis)


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, few enough to read."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        found = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(found) <= 9:
            return found
    return found[:: -(-len(found) // 9)]


def short(value: float) -> str:
    """A number in at most three significant digits: 0.05, 1.5, 120, 30k, 2M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def ink_on(colour: str) -> str:
    """White or dark, whichever is read on `colour`."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK


def remark(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    off: tuple[float, float],
    within: Any = "data",
    boxed: bool = False,
    **style: Any,
) -> None:
    """Text `off` points away from `at`; boxed, it covers what is behind it."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1} if boxed else None
    axes.annotate(text, at, off, xycoords=within, textcoords="offset points", bbox=box, **style)


def remark_along(axes: Axes, text: str, at: tuple[float, float], off: tuple[float, float], **style: Any) -> None:
    """Text along the line y ~ x through `at`, `off` points away, however the logarithmic axes are scaled."""
    figure: Any = axes.figure
    place = offset_copy(axes.transData, figure, *off, units="points")
    angle = math.degrees(math.atan2(at[1], at[0]))
    axes.text(*at, text, transform=place, rotation=angle, rotation_mode="anchor", transform_rotates_text=True, **style)


def note(axes: Axes, text: str) -> None:
    """A remark under a panel."""
    if text:
        lines = wrapped(text, 74)
        remark(axes, lines, (0, 0), (0, -38), "axes fraction", va="top", fontsize=7.5, color=MUTED)
        _grow(axes.figure, 0.06 + 0.07 * lines.count("\n"))


def contender_legend(figure: Figure, known: Mapping[str, Style], shown: Iterable[str]) -> None:
    """One legend for all panels, under them, in the order of the styles."""
    wanted = set(shown)
    names = [name for name in known if name in wanted]
    legend(figure, [Line2D([], [], label=brief(name), **known[name].line()) for name in names])


def legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """A legend under the panels, in as many columns as fit; it is read line by line."""
    if not handles:
        return
    columns = next(c for c in range(len(handles), 0, -1) if c == 1 or _legend_inches(handles, c) <= figure.get_figwidth())
    lines = -(-len(handles) // columns)
    columns = -(-len(handles) // lines)  # no nearly empty last line
    by_line = list(itertools.chain.from_iterable(handles[i::columns] for i in range(columns)))
    with matplotlib.rc_context(_SETTINGS):
        figure.legend(handles=by_line, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)
    _grow(figure, 0.2 * lines)


def _legend_inches(handles: Sequence[Line2D | Patch], columns: int) -> float:
    """About how wide a legend of so many columns is."""
    return sum(0.72 + 0.08 * max(len(str(handle.get_label())) for handle in handles[i::columns]) for i in range(columns))


def brief(name: str, most: int = 36) -> str:
    """The name, its middle left out where it is too long for a picture."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _grow(figure: Any, inches: float) -> None:
    """Room for what is not a panel, so that panels keep their height."""
    figure.set_figheight(figure.get_figheight() + inches)
