"""A server as a target: an OpenAI-compatible one, over HTTP, each answer streamed.

Requests are sent when they are due and not when the server has time, so that a slow server cannot slow the load (no coordinated
omission). A failure ends its request only, and is counted by kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np

from ..interrupts import SIGNALS
from . import openai_api
from .arrivals import Load, Planned
from .outcomes import Outcome, Played
from .request import ServerTarget

_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question", "work",
    "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right",
)  # fmt: skip
_SAID = ("text", "content", "reasoning_content", "reasoning", "tool_calls")  # fields of a piece that carry some of the answer


def play(
    server: ServerTarget,
    load: Load,
    warmup: Load | None = None,
    report: Callable[[int], None] = lambda ended: None,
) -> Played:
    """Sends all requests of a load, and waits for all answers.

    An interrupt (KeyboardInterrupt) ends the run; what has not ended then is `unfinished`.

    Args:
        warmup: sent before, and not part of the result.
        report: is told how many requests have ended, after each.
    """
    run = _Run(server, load, report)
    try:
        interrupted = asyncio.run(_until_interrupted(run.all(warmup)))
    except KeyboardInterrupt:  # of the caller's own, or before the loop was told
        interrupted = True
    seconds = run.now() if interrupted else max((o.ended_s for o in run.outcomes if o.ended_s is not None), default=0.0)
    facts = {"usage_reported": run.with_usage, "endpoint": server.endpoint}
    return Played(run.outcomes, seconds, interrupted, facts)


async def _until_interrupted(work: Coroutine[Any, Any, None]) -> bool:
    """Whether an interrupt ended `work`.

    The event loop is told of signals that would raise KeyboardInterrupt: raised wherever the loop happens to be, that leaves tasks
    behind whose tracebacks are printed.
    """
    loop, task, interrupted = asyncio.get_running_loop(), asyncio.ensure_future(work), False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread is told
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    return interrupted


class _Run:
    """The requests of one run and where they stand."""

    def __init__(self, server: ServerTarget, load: Load, report: Callable[[int], None]) -> None:
        self.server, self.load, self.report = server, load, report
        self.outcomes: list[Outcome] = []
        self.with_usage = 0
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    async def all(self, warmup: Load | None) -> None:
        """The warm-up, then the load."""
        async with openai_api.session(self.server) as session:
            if warmup is not None:
                await self._all(session, warmup)
                self.outcomes, self.with_usage = [], 0
            self._start = time.perf_counter()
            await self._all(session, self.load, self.report)

    async def _all(self, session: Any, load: Load, report: Callable[[int], None] = lambda ended: None) -> None:
        requests = _Sender(self, session, load, report)
        await (requests.open_loop() if load.is_open else requests.closed_loop())


class _Sender:
    """Sends the requests of one load."""

    def __init__(self, run: _Run, session: Any, load: Load, report: Callable[[int], None]) -> None:
        self.run, self.session, self.load, self.report = run, session, load, report
        self._ended = 0

    async def open_loop(self) -> None:
        """Each request at its time, whatever became of those before."""
        room = asyncio.Semaphore(self.load.concurrency) if self.load.concurrency else None
        tasks: set[asyncio.Task[None]] = set()
        try:
            for planned in self.load.planned():
                assert planned.at_s is not None
                if (early := planned.at_s - self.run.now()) > 0:
                    await asyncio.sleep(early)
                outcome = self._due(planned, planned.at_s)
                task = asyncio.create_task(self._when_there_is_room(room, outcome))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:  # their connections are closed next, which is no failure of theirs
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def closed_loop(self) -> None:
        """Each of so many clients sends its next request when it has its answer."""
        source = self.load.planned()
        await asyncio.gather(*(self._client(source) for _ in range(self.load.concurrency or 1)))

    async def _client(self, source: Iterator[Planned]) -> None:
        while self.load.duration_s is None or self.run.now() < self.load.duration_s:
            planned = next(source, None)
            if planned is None:
                return
            await self._one(self._due(planned, self.run.now()))

    def _due(self, planned: Planned, due_s: float) -> Outcome:
        outcome = Outcome(planned.index, due_s, planned.prompt_tokens, planned.output_tokens)
        self.run.outcomes.append(outcome)
        return outcome

    async def _when_there_is_room(self, room: asyncio.Semaphore | None, outcome: Outcome) -> None:
        if room is None:
            await self._one(outcome)
            return
        async with room:
            await self._one(outcome)

    async def _one(self, outcome: Outcome) -> None:
        """One request from end to end; whatever happens becomes its outcome."""
        outcome.started_s = self.run.now()
        try:
            await asyncio.wait_for(self._streamed(outcome), self.run.server.timeout_s)
        except asyncio.TimeoutError:
            outcome.fail(openai_api.TIMEOUT, f"no end within {self.run.server.timeout_s:g} s", self.run.now())
        except Exception as error:  # a server may do anything: it is one request's failure
            failure = openai_api.failure_of(error)
            outcome.fail(failure.kind, str(failure), self.run.now())
        self._ended += 1
        self.report(self._ended)

    async def _streamed(self, outcome: Outcome) -> None:
        text = prompt_of(outcome.prompt_tokens, np.random.default_rng([self.load.seed, 3, outcome.index]))
        answer = openai_api.pieces(self.session, self.run.server, text, outcome.asked_tokens)
        seen, ended_s = _Seen(), self.run.now()
        async with contextlib.aclosing(answer):
            async for piece in answer:
                ended_s = self.run.now()  # what a connection still carries after the last piece is no part of the answer
                if seen.take(piece):
                    outcome.token_s.append(ended_s)
        self._concluded(outcome, seen, ended_s)

    def _concluded(self, outcome: Outcome, seen: _Seen, ended_s: float) -> None:
        """A stream has ended without an error: with an answer, or with less."""
        if not seen.finished:
            outcome.fail(openai_api.BROKEN, "the stream ended without a finish_reason", self.run.now())
            return
        if not outcome.token_s:
            outcome.fail(openai_api.EMPTY, "the answer has no tokens", self.run.now())
            return
        outcome.output_tokens = seen.output_tokens or len(outcome.token_s)
        outcome.prompt_tokens = seen.prompt_tokens or outcome.prompt_tokens
        self.run.with_usage += seen.output_tokens is not None
        outcome.succeed(ended_s)


class _Seen:
    """What the pieces of a stream have said so far."""

    def __init__(self) -> None:
        self.finished = False
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None

    def take(self, piece: Any) -> bool:
        """Notes what a piece says; true when it carries some of the answer."""
        if usage := piece.get("usage"):
            self.output_tokens = usage.get("completion_tokens") or self.output_tokens
            self.prompt_tokens = usage.get("prompt_tokens") or self.prompt_tokens
        if not piece.get("choices"):
            return False
        choice = piece["choices"][0]
        self.finished = self.finished or choice.get("finish_reason") is not None
        said = {"text": choice.get("text")} | (choice.get("delta") or {})
        return any(said.get(name) for name in _SAID)


def prompt_of(tokens: int, rng: np.random.Generator) -> str:
    """A text of so many random words: about so many tokens of most tokenizers, and different for every request.

    The server says how many tokens it counted, and results hold that number where it does.
    """
    return " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), tokens))
