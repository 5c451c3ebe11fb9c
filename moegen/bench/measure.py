"""One point of a benchmark: all contenders on the same batches of T tokens, turn and turn about.

Every output is compared with the float64 reference first, and what is wrong is not timed. Then come rounds in which each
contender in rotating order calls for some milliseconds, with the machine's ceilings sampled between the turns.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import MoEConfig
from . import workload
from .ceilings import Ceilings, Probe
from .contenders.roster import DENSE, OURS
from .contenders.team import Team
from .request import Effort

_KEPT_SAMPLES = 200
_MOST_CALLS = 5000
_PARTS_CALLS = 5

# Says what is being measured, and how many turns were done since the last time.
Report = Callable[[str, int], None]


@dataclasses.dataclass
class Entrant:
    """A contender's standing at one point."""

    name: str
    status: str = "correct"
    reason: str | None = None
    relative_l2: float | None = None
    samples: list[float] = dataclasses.field(default_factory=list)
    turn_medians: list[float] = dataclasses.field(default_factory=list)
    turn_waits: list[float | None] = dataclasses.field(default_factory=list)

    def fail(self, reason: str, status: str = "failed") -> None:
        """Out of the race; what was timed is not quoted."""
        self.status, self.reason = status, reason
        self.samples, self.turn_medians, self.turn_waits = [], [], []


def measure_point(
    team: Team,
    probe: Probe,
    folder: pathlib.Path,
    tokens: int,
    seed: int,
    effort: Effort,
    *,
    dense: bool = False,
    too_slow: Mapping[str, str] | None = None,
    report: Report = lambda what, turns: None,
) -> dict[str, Any]:
    """Measures one point.

    Args:
        team: the contenders, at work on the workload in `folder`.
        tokens: T.
        dense: measure all experts for every token too.
        too_slow: contenders to leave out, with the reason.

    Returns:
        A point of the results, as `moegen.bench.results` describes it.
    """
    config = workload.read_layer(folder)
    report("drawing tokens and computing the reference", 0)
    workload.make_batches(folder, config, tokens, seed)
    work, checks = workload.study(folder, tokens)
    workspaces = team.point(tokens)
    field = [Entrant(name) for name in team.names]
    for entrant in field:
        if too_slow and entrant.name in too_slow:
            entrant.fail(too_slow[entrant.name])
        else:
            report(f"checking {entrant.name}", 0)
            _check(team, entrant, checks, folder, config)
    extra = [Entrant(DENSE)] if dense else []
    ceilings, parts = _rounds(team, probe, [*field, *extra], probe.kind(config.dtype), effort, report)
    workload.remove_batches(folder, tokens)  # not before: a worker that is replaced reads them again
    point = _point(config, tokens, work, ceilings, field, extra, parts)
    rounding = workload.relative_l2(np.concatenate(checks.expected), np.concatenate(checks.whole)) if config.low_bit else None
    return point | {"workspace_bytes": workspaces.get(OURS), "rounding_relative_l2": rounding}


def _check(team: Team, entrant: Entrant, checks: workload.Checks, folder: pathlib.Path, config: MoEConfig) -> None:
    """Compares an entrant's output with the reference; beyond the bound it is wrong."""
    file = folder / "checked.npy"
    reply = team.ask(entrant.name, "check", rows=checks.rows, to=str(file))
    if "error" in reply:
        entrant.fail(reply["error"])
        return
    right = checks.expected if entrant.name in (OURS, DENSE) else checks.whole  # others do not round weights to few bits
    expected = np.concatenate(right[: len(reply["seconds"])])
    l2 = workload.relative_l2(np.load(file), expected)
    bound = workload.bound(config)
    entrant.relative_l2 = l2 if math.isfinite(l2) else None
    if not l2 <= bound:
        entrant.fail(f"wrong: relative L2 error {l2:.1e} is above {bound:.0e}", "wrong")


def _rounds(
    team: Team, probe: Probe, field: list[Entrant], kind: str, effort: Effort, report: Report
) -> tuple[Ceilings, dict[str, float]]:
    """Fills the entrants' samples; returns the ceilings met on the way and the median parts of our layer."""
    probe.flops_per_s(kind), probe.read_bytes_per_s()  # not kept: the threads of the reference's products may still spin
    flops, reads = [probe.flops_per_s(kind)], [probe.read_bytes_per_s()]
    parts: list[dict[str, float]] = []
    for number in range(effort.rounds):
        shift = number % max(len(field), 1)
        for entrant in field[shift:] + field[:shift]:
            if entrant.status != "correct" or sum(entrant.samples) > effort.most_seconds:
                continue
            report(entrant.name, 0)
            _turn(team, entrant, effort)
            flops.append(probe.flops_per_s(kind))
            reads.append(probe.read_bytes_per_s())
        ours = next((e for e in field if e.name == OURS), None)
        if ours is not None and ours.status == "correct":
            parts += team.ask(OURS, "profile", calls=_PARTS_CALLS).get("parts", [])
        report("", 1)
        if effort.quiet_rounds and _known_well(field, effort):
            report("", effort.rounds - number - 1)
            break
    medians = {name: float(np.median([p[name] for p in parts])) for name in (parts[0] if parts else {})}
    return Ceilings(kind, tuple(flops), tuple(reads)), medians


def _known_well(field: list[Entrant], effort: Effort) -> bool:
    """Whether every contender that still has turns had enough quiet rounds beside ours."""
    racing = [e for e in field if e.status == "correct" and e.name != OURS and sum(e.samples) <= effort.most_seconds]
    ours = next((e for e in field if e.name == OURS), None)
    mine = ours.turn_waits if ours is not None else []
    return all(len(quiet(entrant.turn_waits, mine, effort.quiet_share)) >= effort.quiet_rounds for entrant in racing)


def quiet(theirs: Sequence[float | None], ours: Sequence[float | None], most: float) -> list[int]:
    """The rounds in which neither waited for a processor for more than such a share of its turn; what is not known is quiet."""
    return [i for i, pair in enumerate(zip(theirs, ours, strict=False)) if all(wait is None or wait <= most for wait in pair)]


def _turn(team: Team, entrant: Entrant, effort: Effort) -> None:
    reply = team.ask(entrant.name, "time", seconds=effort.min_ms / 1e3, most_calls=_MOST_CALLS)
    if "error" in reply:
        entrant.fail(reply["error"])
    else:
        entrant.samples += reply["seconds"]
        entrant.turn_medians.append(float(np.median(reply["seconds"])))
        entrant.turn_waits.append(reply["waited"])


# ---------------------------------------------------------------- results


def _point(
    config: MoEConfig,
    tokens: int,
    work: workload.Work,
    ceilings: Ceilings,
    field: list[Entrant],
    extra: list[Entrant],
    parts: dict[str, float],
) -> dict[str, Any]:
    ours = next((float(np.median(e.samples)) for e in field if e.name == OURS and e.samples), None)
    return {
        "tokens": tokens,
        "flops": work.flops,
        "active_experts": work.active_experts,
        "weight_bytes_read": work.weight_bytes,
        "ceilings": {
            "flops_per_s": ceilings.flops_per_s,
            "read_bytes_per_s": ceilings.read_bytes_per_s,
            "flops_samples": list(ceilings.flops_samples),
            "read_samples": list(ceilings.read_samples),
            "kind": ceilings.kind,
        },
        "roofline_seconds": ceilings.roofline_seconds(work.flops, work.weight_bytes),
        "contenders": [_standing(entrant, tokens, work, ceilings, ours) for entrant in field],
        "parts": parts,
        "expert_load": list(work.expert_load),
        "dense": _dense(config, extra, ours),
    }


def _standing(entrant: Entrant, tokens: int, work: workload.Work, ceilings: Ceilings, ours: float | None) -> dict[str, Any]:
    """An entrant's row; those that do not store weights in few bits have more bytes to read."""
    row: dict[str, Any] = {
        "name": entrant.name,
        "status": entrant.status,
        "reason": entrant.reason,
        "relative_l2": entrant.relative_l2,
        "calls": len(entrant.samples),
    }
    if not entrant.samples:
        rates = ("seconds", "tokens_per_s", "flops_per_s", "bytes_per_s", "roofline_fraction", "ratio_to_moegen")
        return row | dict.fromkeys(rates) | {"samples": [], "turn_medians": [], "turn_waits": []}
    median, p95, p99 = (float(q) for q in np.percentile(entrant.samples, (50, 95, 99)))
    weight_bytes = work.weight_bytes if entrant.name == OURS else work.whole_bytes
    kept = np.unique(np.linspace(0, len(entrant.samples) - 1, _KEPT_SAMPLES).astype(int))
    return row | {
        "seconds": {"median": median, "p95": p95, "p99": p99, "min": min(entrant.samples), "max": max(entrant.samples)},
        "samples": [entrant.samples[i] for i in kept],
        "turn_medians": entrant.turn_medians,
        "turn_waits": entrant.turn_waits,
        "tokens_per_s": tokens / median,
        "flops_per_s": work.flops / median,
        "bytes_per_s": weight_bytes / median,
        "roofline_fraction": ceilings.roofline_seconds(work.flops, weight_bytes) / median,
        "ratio_to_moegen": median / ours if ours else None,
    }


def _dense(config: MoEConfig, extra: list[Entrant], ours: float | None) -> dict[str, Any] | None:
    if not extra or not extra[0].samples or ours is None:
        return None
    c = config
    calls = -(-c.experts // c.top_k)
    scale = c.experts / (calls * c.top_k)  # the last call may repeat experts: their share is taken off
    seconds = float(np.median(extra[0].samples)) * scale
    return {
        "seconds": seconds,
        "measured_ratio": seconds / ours,
        "arithmetic_ratio": c.experts / c.top_k,
        "how": f"every token through all {c.experts} experts: {calls} calls of moegen's own experts with {c.top_k} of them each"
        + (f", times {scale:.3f} because the last call repeats some" if scale < 1 else "")
        + "; router, shared expert and the sum of the calls' outputs are left out, in favour of the dense layer",
    }
