"""One cell: every contender checked against float64, then timed turn and turn about."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from . import truth
from .capture import Replay
from .cells import Cell
from .material import Batch, Weights, draw_batches, work
from .own_experts import OURS

_TURN_SECONDS = 4e-3
_ROUNDS = 15
_MOST_SECONDS = 0.9  # of one contender's turns in a cell
_CHOICE_TURNS = 5

# Says which contender does what, so that who waits can tell who hangs.
Report = Callable[[str, str], None]


class Contender(Protocol):
    """What computes routed experts."""

    name: str

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        """What computes a batch: its output [T, H]."""


@runtime_checkable
class Tunable(Contender, Protocol):
    """One that has several ways to do so."""

    tile: Any

    def candidates(self, tokens: int) -> Sequence[Any]:
        """What `tile` may be for T=`tokens`."""


@dataclasses.dataclass
class Entrant:
    """A contender's standing in a cell."""

    name: str
    status: str = "correct"
    reason: str | None = None
    relative_l2: float | None = None
    replay: Replay | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[float] = dataclasses.field(default_factory=list)
    rounds: list[int] = dataclasses.field(default_factory=list)

    def fail(self, reason: str, status: str = "failed") -> None:
        """Out of the race."""
        self.status, self.reason, self.replay, self.samples, self.rounds = status, reason, None, [], []


def batch_count(tokens: int) -> int:
    """Batches that take turns, so that none finds its weights or rows in the cache."""
    return next((count for most, count in ((16, 8), (64, 4)) if tokens <= most), 2)


def measure(
    cell: Cell, weights: Weights, contenders: Sequence[Contender], absent: Mapping[str, str], device: str, seed: int, report: Report
) -> dict[str, Any]:
    """Measures a cell.

    Args:
        absent: contenders that are not there, with the reason.

    Returns:
        The cell's fields, `work`, and for each contender its standing: status, reason, relative_l2, mode, launches, samples in
        seconds and the rounds that they are of, median and quartiles, and the same of its ratio to ours within a round.
    """
    batches = draw_batches(weights.config, cell.tokens, cell.routing, batch_count(cell.tokens), device, seed)
    field = [_entered(contender, weights, batches, report) for contender in contenders]
    field += [Entrant(name, "absent", reason) for name, reason in absent.items()]
    _rounds([entrant for entrant in field if entrant.replay is not None], report)
    ours = next((e for e in field if e.name == OURS), None)
    return cell.to_dict() | {
        "work": work(weights.config, batches),
        "seed": seed,
        "contenders": [_standing(entrant, ours) for entrant in field],
    }


def _entered(contender: Contender, weights: Weights, batches: Sequence[Batch], report: Report) -> Entrant:
    entrant = Entrant(contender.name)
    report(contender.name, "preparing")
    try:
        if isinstance(contender, Tunable):
            entrant.notes["tile"] = dataclasses.asdict(_choose(contender, batches[0], report))
        entrant.replay = Replay([contender.prepare(batch) for batch in batches])
        report(contender.name, "checking")
        _check(entrant, weights, batches)
    except Exception as error:  # whatever a library raises: it is out, with its reason, and the others go on
        torch.cuda.synchronize()  # but where the device itself is lost, this ends the process
        entrant.fail(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    return entrant


def _choose(contender: Tunable, batch: Batch, report: Report) -> Any:
    """The tile with the least median of a few runs; those that need more than the device has are passed over."""
    times = {}
    for tile in contender.candidates(len(batch.x)):
        report(contender.name, f"trying {tile}")
        contender.tile = tile
        try:
            replay = Replay([contender.prepare(batch)])
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        times[tile] = statistics.median(replay.seconds(1) for _ in range(_CHOICE_TURNS))
    contender.tile = min(times, key=lambda tile: times[tile])
    return contender.tile


def _check(entrant: Entrant, weights: Weights, batches: Sequence[Batch]) -> None:
    """The first and the last batch against float64, written over NaN."""
    replay = entrant.replay
    assert replay is not None
    replay.run()
    replay.poison()
    replay.run()
    errors = []
    for index in {0, len(batches) - 1}:
        tokens = truth.checked(len(batches[index].x))
        errors.append(truth.relative_l2(replay.outputs[index][tokens], truth.expected(weights, batches[index], tokens)))
        if not bool(torch.isfinite(replay.outputs[index]).all()):
            entrant.fail("wrong: the output is not finite everywhere", "wrong")
            return
    entrant.relative_l2 = max(errors)
    bound = truth.BOUNDS[weights.config.dtype]
    if not entrant.relative_l2 <= bound:
        entrant.fail(f"wrong: relative L2 error {entrant.relative_l2:.1e} is above {bound:.0e}", "wrong")


def _rounds(field: Sequence[Entrant], report: Report) -> None:
    """Fills the samples; who began a round differs from round to round."""
    repeats = {}
    for entrant in field:
        assert entrant.replay is not None
        report(entrant.name, "warming up")
        once = max(entrant.replay.seconds(1) for _ in range(2)) * len(entrant.replay.calls)
        repeats[entrant.name] = max(1, round(_TURN_SECONDS / max(once, 1e-7)))
    spent = dict.fromkeys(repeats, 0.0)
    for number in range(_ROUNDS):
        shift = number % max(len(field), 1)
        for entrant in [*field[shift:], *field[:shift]]:
            if entrant.replay is None or spent[entrant.name] > _MOST_SECONDS:
                continue
            report(entrant.name, "timing")
            start = time.monotonic()
            entrant.samples.append(entrant.replay.seconds(repeats[entrant.name]))
            entrant.rounds.append(number)
            spent[entrant.name] += time.monotonic() - start


# ---------------------------------------------------------------- standings


def _standing(entrant: Entrant, ours: Entrant | None) -> dict[str, Any]:
    replay = entrant.replay
    row = {
        "name": entrant.name,
        "status": entrant.status,
        "reason": entrant.reason,
        "relative_l2": entrant.relative_l2 if entrant.relative_l2 is not None and math.isfinite(entrant.relative_l2) else None,
        "mode": replay.mode if replay else None,
        "launches": replay.launches if replay else None,
        "notes": entrant.notes,
        "samples": entrant.samples,
        "seconds": spread(entrant.samples),
        "ratio": None,
    }
    if ours is not None and ours.samples and entrant.samples:
        own = dict(zip(ours.rounds, ours.samples, strict=True))
        pairs = zip(entrant.rounds, entrant.samples, strict=True)
        row["ratio"] = spread([theirs / own[number] for number, theirs in pairs if number in own])
    return row


def spread(samples: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles; None of nothing."""
    if not samples:
        return None
    if len(samples) == 1:
        return dict.fromkeys(("median", "low", "high"), samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
