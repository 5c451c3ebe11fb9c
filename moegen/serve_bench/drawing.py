"""The picture of a load test: how long requests took, and how many were under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..report import drawing
from ..report.drawing import MUTED, Axes, Style
from .outcomes import FAILED, Outcome
from .printing import load_words
from .results import SERVER
from .summary import PERCENTILES, in_flight

_PANELS = {
    "ttft": ("Time to first token", "ttft_s"),
    "e2e": ("Whole request", "e2e_s"),
    "itl": ("Between two tokens of a request", None),
}
_SHORTEST_SECONDS = 1e-6  # on a logarithmic axis: tokens that came in one piece have no time between them
_HOW_TO_READ = (
    "A curve says which share of the samples took at most so long, on a logarithmic axis; its dots are P50, P95 and P99, where "
    "there are enough samples for them. Times count from when a request was due."
)

Json = Mapping[str, Any]


def draw(document: Json) -> bytes:
    """A PNG of a document as `moegen.serve_bench.results` describes it.

    Raises:
        ReportError: what draws it is not installed.
    """
    entries = document["contenders"]
    known = drawing.styles(entry["name"] for entry in entries)
    shown = [entry for entry in entries if entry["summary"] is not None]
    figure, axes = drawing.panels([*(title for title, _ in _PANELS.values()), "Requests under way"])
    for panel, (latency, (_, limit)) in zip(axes, _PANELS.items(), strict=False):
        _distribution(panel, shown, latency, known, (document["objective"] or {}).get(limit))
    _timeline(axes[-1], shown, known)
    drawing.note(axes[-2], _failures(shown))
    drawing.note(axes[-1], _without(entries))
    drawing.contender_legend(figure, known, known)
    target = document["target"]
    name = f"{target['model']} at {target['url']}" if target["kind"] == SERVER else f"{target['name']} {target['config']['dtype']}"
    drawing.heading(figure, name, " ".join([f"{load_words(document['load'])}.", _HOW_TO_READ, *_remarks(document)]))
    return drawing.png(figure)


def _remarks(document: Json) -> list[str]:
    """What is only to be said of some pictures."""
    failed = any(entry["summary"] is not None and entry["summary"]["failed"] for entry in document["contenders"])
    said = {
        "The dotted line is the objective.": document["objective"],
        "Crosses are failures, at the time when they ended.": failed,
        "Requests under way are those of the first round.": document["rounds"] > 1,
        "Interrupted: this is what was measured until then.": document["interrupted"],
    }
    return [sentence for sentence, holds in said.items() if holds]


def _distribution(axes: Axes, shown: Sequence[Json], latency: str, known: Mapping[str, Style], limit: float | None) -> None:
    """The share of samples that are shorter, against time."""
    axes.set(ylabel="% of samples", xlabel="milliseconds", ylim=(-3, 103))
    drawn = False
    for entry in shown:
        found = entry["summary"]["latency"][latency]
        if found is None:
            continue
        drawn = True
        line = known[entry["name"]].line()
        plain = {name: line[name] for name in ("color", "linestyle", "linewidth", "zorder")}
        axes.plot(_milliseconds(found["curve"]), np.linspace(0, 100, len(found["curve"])), **plain)
        fit = [(found[name], share) for name, share in PERCENTILES.items() if name not in found["thin"]]
        axes.plot(_milliseconds([time for time, _ in fit]), [share for _, share in fit], **(line | {"linestyle": "none"}))
    if limit is not None:
        axes.axvline(limit * 1e3, color=MUTED, linestyle=":", linewidth=1.5)
    if drawn or limit is not None:
        drawing.log_numbers(axes.xaxis, at_least=None if limit is None else (limit * 1e3, limit * 1e3))
    if not drawn:
        axes.set(xticks=[]) if limit is None else None
        _nothing(axes, "no samples")


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [max(value, _SHORTEST_SECONDS) * 1e3 for value in seconds]


def _timeline(axes: Axes, shown: Sequence[Json], known: Mapping[str, Style]) -> None:
    """Requests that were due and had not ended, over the first round; failures where they ended."""
    axes.set(ylabel="requests", xlabel="seconds")
    most = 1
    for entry in shown:
        requests = entry["turns"][0]["requests"]
        style = known[entry["name"]]
        steps = in_flight([_outcome(request) for request in requests])
        axes.step([at for at, _ in steps], [count for _, count in steps], where="post", color=style.colour, linewidth=1.3)
        most = max(most, *(count for _, count in steps), 1)
        failed = [request["ended_s"] for request in requests if request["status"] == FAILED]
        if failed:  # an empty line that is not clipped takes all the room that there is
            axes.plot(failed, [0] * len(failed), linestyle="none", marker="x", color=style.colour, markersize=6, clip_on=False)
    axes.set_ylim(-0.03 * most, most * 1.08)  # a zero at the corner would lie upon that of the other axis
    axes.set_xlim(left=0)
    drawing.whole_numbers(axes.yaxis)
    if not any(entry["turns"][0]["requests"] for entry in shown):
        _nothing(axes, "no requests")


def _outcome(request: Json) -> Outcome:
    return Outcome(request["index"], request["due_s"], request["prompt_tokens"], 0, ended_s=request["ended_s"])


def _nothing(axes: Axes, text: str) -> None:
    drawing.remark(axes, text, (0.5, 0.5), (0, 0), "axes fraction", boxed=True, ha="center", color=MUTED)


def _failures(shown: Sequence[Json]) -> str:
    """Who failed how often and how: "server: 12 of 40 failed (timeout 10, HTTP 503 2)"."""
    said = []
    for entry in shown:
        summary = entry["summary"]
        if summary["failed"]:
            kinds = ", ".join(f"{failure['kind']} {failure['count']}" for failure in summary["failures"])
            said.append(f"{drawing.brief(entry['name'])}: {summary['failed']} of {summary['requests']} failed ({kinds})")
    return "; ".join(said)


def _without(entries: Sequence[Json]) -> str:
    bad = [f"{drawing.brief(entry['name'])} {entry['status']}" for entry in entries if entry["summary"] is None]
    return f"Not shown: {', '.join(bad)}" if bad else ""
