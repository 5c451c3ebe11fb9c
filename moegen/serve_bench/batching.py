"""A layer as a server would run it: continuous batching with chunked prefill, around one call of the layer for each step.

A step takes the next token of every request that is decoding, and fills what is left of the batch with tokens of prompts, in
the order in which requests came; a prompt that does not fit is continued in the next step. (Orca, OSDI 2022, batches by
iteration; Sarathi-Serve, arXiv:2403.02310, cuts prompts into chunks between decodes.) The step with a prompt's last token
gives the first token of the output, each further one takes a step, as in a language model.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import HostArray, empty_aligned
from ..errors import MeasureError
from .arrivals import Load, Planned
from .outcomes import Outcome, Played

# Writes the layer's output for x [T, H] into out [T, H].
Call = Callable[[HostArray, HostArray], None]
_STRIDE = 997  # between the first rows of neighbouring requests: a prime, so that requests differ
_KEPT_OF_A_REQUEST = 8
_LEAST_NAP_SECONDS = 1e-6
_NAP_SECONDS = 0.02  # at most so long without looking whether to stop


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one step may hold.

    Args:
        batch_tokens: tokens, of prompts and decodes together.
        active: requests that are under way at once; others wait.
    """

    batch_tokens: int = 512
    active: int = 256


def check_limits(limits: Limits) -> None:
    """Refuses limits under which decodes would not fit into a step.

    Raises:
        MeasureError: a limit is below 1, or more requests than tokens.
    """
    for name, value in dataclasses.asdict(limits).items():
        if value < 1:
            raise MeasureError(f"{name}={value} must be at least 1")
    if limits.active > limits.batch_tokens:
        raise MeasureError(
            f"active={limits.active} requests do not fit into steps of batch_tokens={limits.batch_tokens}: each may decode a token"
        )


@dataclasses.dataclass
class _Active:
    """A request under way: how much of its prompt was taken, how much of its output is there."""

    outcome: Outcome
    taken: int = 0

    @property
    def first_row(self) -> int:
        return self.outcome.index * _STRIDE

    @property
    def left_of_prompt(self) -> int:
        return self.outcome.prompt_tokens - self.taken

    @property
    def rows(self) -> int:
        """Rows that the request puts through the layer in all; the last token of the output is never put in."""
        return self.outcome.prompt_tokens + self.outcome.asked_tokens - 1


@dataclasses.dataclass
class Kept:
    """Outputs of some rows of a request, to be compared.

    Args:
        index: the request's place in the run.
        rows: rows of the pool that it put in.
        outputs: [len(rows), H] in the layer's storage type, in the same order.
    """

    index: int
    rows: list[int]
    outputs: npt.NDArray[Any]


class Batcher:
    """Puts requests through one layer.

    Args:
        call: the layer.
        pool: [N, H] tokens; a request's are rows of it, one after the other and around the end.
        limits: of a step.
    """

    def __init__(self, call: Call, pool: HostArray, limits: Limits) -> None:
        check_limits(limits)
        self.call, self.pool, self.limits = call, pool, limits
        shape = (limits.batch_tokens, pool.shape[1])
        self._x, self._out = (HostArray(empty_aligned(shape, pool.data.dtype), pool.dtype) for _ in range(2))
        self.steps = 0
        self.batched_tokens = 0
        self.layer_s = 0.0

    def play(
        self,
        load: Load,
        *,
        keep: frozenset[int] = frozenset(),
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[int], None] = lambda ended: None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> tuple[Played, list[Kept]]:
        """All requests of a load, until they are through.

        Args:
            keep: requests of which some outputs are kept.
            stop: asked between steps; true ends the run, and what is under way stays unfinished.
            report: is told how many requests have ended, after each step.
            clock, sleep: of seconds; a test may have its own.
        """
        self.steps, self.batched_tokens, self.layer_s = 0, 0, 0.0
        arrivals = _Arrivals(load, clock, clock())
        active: list[_Active] = []
        kept: dict[int, Kept] = {}
        while not (stopped := stop()):
            arrivals.admit(active, self.limits.active)
            if not active:
                if arrivals.exhausted:
                    break
                sleep(min(max(arrivals.seconds_to_next, _LEAST_NAP_SECONDS), _NAP_SECONDS))
                continue
            self._step(active, arrivals, keep, kept)
            active = [request for request in active if request.outcome.ended_s is None]
            report(arrivals.ended)
        seconds = max((o.ended_s for o in arrivals.outcomes if o.ended_s is not None), default=0.0)
        facts = {"steps": self.steps, "batch_tokens": self.batched_tokens, "layer_seconds": self.layer_s}
        played = Played(arrivals.outcomes, arrivals.now() if stopped else seconds, stopped, facts)
        return played, [kept[index] for index in sorted(kept)]

    def _step(self, active: list[_Active], arrivals: _Arrivals, keep: frozenset[int], kept: dict[int, Kept]) -> None:
        """One call of the layer, and what it means for each request in it."""
        chosen, rows = self._chosen(active)
        count = len(rows)
        x, out = HostArray(self._x.data[:count], self._x.dtype), HostArray(self._out.data[:count], self._out.dtype)
        np.take(self.pool.data, rows, axis=0, out=x.data)
        if keep:
            self._poison(chosen, keep)
        begun = arrivals.now()
        self.call(x, out)
        ended = arrivals.now()
        self.steps, self.batched_tokens, self.layer_s = self.steps + 1, self.batched_tokens + count, self.layer_s + ended - begun
        place = 0
        for request, taken in chosen:
            if request.outcome.index in keep:
                _keep(request, taken, rows[place : place + taken], out.data[place : place + taken], kept)
            _advance(request, taken, begun, ended)
            arrivals.ended += request.outcome.ended_s is not None
            place += taken

    def _chosen(self, active: list[_Active]) -> tuple[list[tuple[_Active, int]], npt.NDArray[np.intp]]:
        """How many tokens of which requests the next step takes, and the rows of the pool that they are."""
        room, length = self.limits.batch_tokens, len(self.pool.data)
        chosen = [(request, 1) for request in active if not request.left_of_prompt > 0]
        room -= len(chosen)
        for request in active:
            if room and request.left_of_prompt > 0:
                chosen.append((request, min(room, request.left_of_prompt)))
                room -= chosen[-1][1]
        starts = [request.first_row + request.taken for request, _ in chosen]
        counts = [count for _, count in chosen]
        places = np.repeat(starts, counts) + (np.arange(sum(counts)) - np.repeat(np.cumsum(counts) - counts, counts))
        return chosen, places % length

    def _poison(self, chosen: list[tuple[_Active, int]], keep: frozenset[int]) -> None:
        """NaN where outputs will be kept: a layer that writes nothing must not pass for the one before."""
        place = 0
        for request, count in chosen:
            if request.outcome.index in keep:
                self._out.data[place : place + count].view(np.uint8)[...] = 0xFF
            place += count


def _advance(request: _Active, taken: int, begun: float, ended: float) -> None:
    outcome = request.outcome
    if outcome.started_s is None:
        outcome.started_s = begun
    request.taken += taken
    if request.left_of_prompt <= 0:
        outcome.token_s.append(ended)
        outcome.output_tokens += 1
    if request.taken >= request.rows:
        outcome.succeed(ended)


def _keep(request: _Active, taken: int, rows: npt.NDArray[np.intp], out: npt.NDArray[Any], kept: dict[int, Kept]) -> None:
    """Copies what the step gave for the wanted tokens of a request."""
    wanted = [i - request.taken for i in kept_tokens(request.rows) if request.taken <= i < request.taken + taken]
    if not wanted:
        return
    found = kept.setdefault(request.outcome.index, Kept(request.outcome.index, [], out[:0].copy()))
    found.rows += [int(rows[i]) for i in wanted]
    found.outputs = np.concatenate((found.outputs, out[wanted]))


def kept_tokens(rows: int) -> list[int]:
    """Which of a request's rows are kept: its first and its last, and some between."""
    return sorted({round(i) for i in np.linspace(0, rows - 1, min(rows, _KEPT_OF_A_REQUEST))})


class _Arrivals:
    """Requests as they become due, by the clock in an open loop, one for each that ended in a closed one."""

    def __init__(self, load: Load, clock: Callable[[], float], start: float) -> None:
        self.load, self.outcomes = load, list[Outcome]()
        self.ended = 0
        self._clock, self._start = clock, start
        self._source: Iterator[Planned] = load.planned()
        self._next = next(self._source, None)
        self._waiting: collections.deque[Outcome] = collections.deque()

    def now(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def exhausted(self) -> bool:
        """Whether nothing comes any more."""
        return self._next is None and not self._waiting

    @property
    def seconds_to_next(self) -> float:
        """Until the next request is due, in an open loop."""
        return max(self._next.at_s - self.now(), 0.0) if self._next is not None and self._next.at_s is not None else 0.0

    def admit(self, active: list[_Active], most: int) -> None:
        """Moves requests that are due into `active`, as many as may be under way."""
        now = self.now()
        if self.load.is_open:
            while self._next is not None and self._next.at_s is not None and self._next.at_s <= now:
                self._take(self._next.at_s)
        else:
            if self.load.duration_s is not None and now >= self.load.duration_s:
                self._next = None
            clients = self.load.concurrency or 1
            while self._next is not None and len(active) + len(self._waiting) < clients:
                self._take(now)
        room = min(most, self.load.concurrency or most) - len(active)
        for _ in range(min(max(room, 0), len(self._waiting))):
            active.append(_Active(self._waiting.popleft()))

    def _take(self, due_s: float) -> None:
        assert self._next is not None
        outcome = Outcome(self._next.index, due_s, self._next.prompt_tokens, self._next.output_tokens)
        self.outcomes.append(outcome)
        self._waiting.append(outcome)
        self._next = next(self._source, None)
