"""All pictures of a report, each a PNG with a title and a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import comparisons, drawing, experts, insides
from .readings import Readings, Run

THROUGHPUT = "Higher is better. Medians of whole calls; both axes are logarithmic."
RATIO = "The contender's median time divided by ours. Above the line ours is faster, in the shaded part below it the other one is."
ROOFLINE = (
    "How fast it was computed, against how much there is to compute for each byte of weights that has to be read. The bent line is "
    "the median of the ceilings measured beside the calls, the band their range. "
    "What lies on it could only be faster if weights stayed in caches."
)
PARTS = (
    "Shares of one call, from top to bottom in the order of the legend; over each bar the median time of a call. "
    "The parts are timed in calls of their own: what is in no part is the way in and out, and by how much calls differ."
)
LOAD = "How the routing spreads the largest batches over the experts, busiest first; all batches of that size together."
TUNING = (
    "A dot is a candidate that ran and was correct; the line is the best so far, the dashed one what is used without tuning. "
    "The best of many trials is partly the luckiest: what was decided after measuring again stands under each picture."
)

EXPERTS = (
    "Choices of the experts, before capacity. Evenness is the entropy of the choices over the largest possible, 1 when all experts "
    "work alike, of the calls since the point before."
)


class Picture(NamedTuple):
    """A picture under the name of its file."""

    file: str
    title: str
    caption: str
    png: bytes


def draw(readings: Readings) -> Iterator[Picture]:
    """The pictures that the readings give something for, in the order of the page."""
    runs = [run for run in readings.runs if run.data["points"]]
    known = drawing.styles(c["name"] for run in runs for point in run.data["points"] for c in point["contenders"])
    for (dtype, threads), members in _groups(runs).items():
        what = f"{dtype}, {threads} thread{'s' if threads != 1 else ''}"
        slug = f"{dtype}-{threads}t.png"
        yield _picture(f"throughput-{slug}", f"Tokens per second, {what}", THROUGHPUT, comparisons.throughput(members, known))
        if compared := [run for run in members if comparisons.has_ratios(run)]:
            yield _picture(f"ratio-{slug}", f"Time against ours, {what}", RATIO, comparisons.ratio(compared, known))
        yield _picture(f"roofline-{slug}", f"Roofline, {what}", ROOFLINE, comparisons.roofline(members, known))
        if divided := [run for run in members if any(point["parts"] for point in run.data["points"])]:
            yield _picture(f"parts-{slug}", f"Where our time goes, {what}", PARTS, insides.parts(divided))
    if any(point["expert_load"] for run in runs for point in run.data["points"]):
        yield _picture("load.png", "Tokens per expert", LOAD, insides.load(runs))
    if readings.load is not None:
        yield _picture("experts.png", "Which experts work", EXPERTS, experts.figure(readings.load))
    if readings.tunings:
        yield _picture("tuning.png", "Tuning", TUNING, insides.tuning(readings.tunings))


def _groups(runs: list[Run]) -> dict[tuple[str, int], list[Run]]:
    """Runs that share a roof: by dtype and threads."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.data["config"]["dtype"], run.data["threads"]), []).append(run)
    return groups


def _picture(file: str, title: str, caption: str, figure: drawing.Figure) -> Picture:
    return Picture(file, title, caption, drawing.png(figure))
