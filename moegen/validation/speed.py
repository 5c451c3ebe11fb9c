"""Beside NumPy and torch: the benchmark of `moegen.bench`, stopped when its time is over, and what it says about claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ..bench.contenders.roster import FAMILIES, OURS
from ..bench.measure import quiet
from ..bench.request import Effort, Request, Subject
from ..bench.run import Watch, bench
from ..display import duration, percent
from .claims import CONFIDENCE, QUIET_SHARE, Finding
from .intervals import Interval, ratio_interval
from .limits import OutOfTime, time_limit

Json = Mapping[str, Any]

# Rivals by what a claim calls them: families of the benchmark.
RIVALS = {"numpy": ("numpy",), "torch": ("torch", "onednn")}
AGAINST = ",".join(family for families in RIVALS.values() for family in families)


class _Told(Watch):
    """Passes on what is being measured."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def step(self, what: str, turns: int = 0) -> None:
        if what:
            self.say(what)


def measured(subject: Subject, request: Request, document: dict[str, Any], seconds: float, say: Callable[[str], None]) -> bool:
    """Adds a run of one layer to the benchmark's document; False when time was over before it was complete.

    Raises:
        MeasureError: it cannot be measured here.
    """
    try:
        with time_limit(seconds):
            bench([subject], request, document, _Told(say))
    except OutOfTime:
        return False
    return True


def request(tokens: tuple[int, ...], effort: Effort, seed: int, store: str) -> Request:
    """What is measured: all processors, routing that is uniform but for chance."""
    return Request(tokens=tokens, against=AGAINST, effort=effort, seed=seed, store=store)


def ratios(point: Json) -> dict[str, Interval]:
    """The interval of each other contender's time over ours, where both were correct for enough rounds."""
    turns = {c["name"]: c for c in point["contenders"] if c["status"] == "correct"}
    ours = turns.pop(OURS, None)
    made = {name: _interval(theirs, ours) for name, theirs in turns.items() if ours is not None}
    return {name: interval for name, interval in made.items() if interval is not None}


def _interval(theirs: Json, ours: Json) -> Interval | None:
    rounds = quiet(theirs["turn_waits"], ours["turn_waits"], QUIET_SHARE)
    slower, own = ([c["turn_medians"][i] for i in rounds] for c in (theirs, ours))
    return ratio_interval(slower, own, CONFIDENCE)


def findings(run: Json) -> dict[str, Finding]:
    """What a run says about the claims of its layer."""
    found: dict[str, Finding] = {}
    for point in run["points"]:
        tokens = point["tokens"]
        ours = next(c for c in point["contenders"] if c["name"] == OURS)
        for rival, families in RIVALS.items():
            found[f"{rival}_{tokens}"] = _against(families, run, point, ours)
        found[f"roofline_{tokens}"] = _of_roofline(point, ours)
    return found


def _against(families: tuple[str, ...], run: Json, point: Json, ours: Json) -> Finding:
    """The lowest lower bound of all contenders of these families: faster than the best is faster than each."""
    if ours["status"] != "correct":
        return Finding(float("nan"), f"our own output was {ours['status']}: {ours['reason']}")
    names = [name for family in families for name in FAMILIES[family].contenders]
    known = {name: interval for name, interval in ratios(point).items() if name in names}
    lost = [f"{c['name']} ({c['reason']})" for c in point["contenders"] if c["name"] in names and c["status"] != "correct"]
    lost += [f"{c['name']} ({c['reason']})" for c in run["absent"] if c["name"] in names]
    disturbed = [
        c["name"] for c in point["contenders"] if c["name"] in names and c["status"] == "correct" and c["name"] not in known
    ]
    lost += [f"{name} ({_disturbance(point, name, ours)})" for name in disturbed]
    if not known:
        return Finding(None, f"no interval: {'; '.join(lost) or 'it was not measured'}")
    name, closest = min(known.items(), key=lambda item: item[1].low)
    words = f"{name} takes {closest} times ours of {duration(ours['seconds']['median'])}, {closest.rounds} rounds"
    return Finding(closest.low, "; ".join([words, *(f"without {reason}" for reason in lost)]))


def _disturbance(point: Json, name: str, ours: Json) -> str:
    theirs = next(c for c in point["contenders"] if c["name"] == name)
    rounds = len(theirs["turn_medians"])
    calm = len(quiet(theirs["turn_waits"], ours["turn_waits"], QUIET_SHARE))
    return f"{rounds} rounds, {rounds - calm} of them disturbed by other processes"


def _of_roofline(point: Json, ours: Json) -> Finding:
    if ours["status"] != "correct":
        return Finding(float("nan"), f"our own output was {ours['status']}: {ours['reason']}")
    peak = point["ceilings"]
    limits = f"{peak['flops_per_s'] / 1e9:.0f} GFLOP/s ({peak['kind']}), {peak['read_bytes_per_s'] / 1e9:.1f} GB/s, measured beside"
    calm = [ours["turn_medians"][i] for i in quiet(ours["turn_waits"], ours["turn_waits"], QUIET_SHARE)]
    if not calm:
        return Finding(None, f"all {len(ours['turn_medians'])} rounds were disturbed by other processes")
    seconds = statistics.median(calm)
    share = float(point["roofline_seconds"]) / seconds
    return Finding(share, f"{percent(share)}: {duration(point['roofline_seconds'])} of {duration(seconds)}; {limits}")
