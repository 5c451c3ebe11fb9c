"""A server as a target: an OpenAI-compatible one, over HTTP, by the `openai` package, each answer streamed.

Requests are sent when they are due and not when the server has time, so that a slow server cannot slow the load (no coordinated
omission). A failure ends its request only, and is counted by kind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import numpy as np

from ..errors import MeasureError, without_client
from .arrivals import Load, Planned
from .outcomes import Outcome, Played
from .request import ServerTarget

try:
    import httpx2
    import openai
except ModuleNotFoundError as error:
    raise without_client(error) from None

REFUSED, TIMEOUT, BROKEN, EMPTY, MALFORMED = "no connection", "timeout", "broken stream", "no tokens", "malformed reply"
_SENTENCE = 300
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question", "work",
    "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right",
)  # fmt: skip


def url_without_secrets(server: ServerTarget) -> str:
    """The address as results may hold it.

    Raises:
        MeasureError: it is none that can be asked.
    """
    try:
        url = httpx2.URL(server.url)
    except httpx2.InvalidURL as error:
        raise MeasureError(f"url={server.url!r} is no address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise MeasureError(f"url={server.url!r} must be like http://127.0.0.1:8000/v1")
    return str(url.copy_with(username=None, password=None, query=None))


def only_model(server: ServerTarget) -> str:
    """The model that a server has.

    Raises:
        MeasureError: it lists none or several, or does not answer.
    """
    key = server.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    try:
        with openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=min(server.timeout_s, 30.0)) as client:
            names = [model.id for model in client.models.list()]
    except Exception as error:  # the library, or what it makes of a reply that is none
        raise MeasureError(f"{server.url} does not say which models it has ({_kind_of(error)}): give its name (--model)") from error
    if len(names) != 1:
        raise MeasureError(f"{server.url} has {len(names)} models ({', '.join(names[:8])}): name one of them (--model)")
    return str(names[0])


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
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
        key = self.server.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(self.server.timeout_s)
        async with openai.AsyncOpenAI(
            base_url=self.server.url,
            api_key=key,
            max_retries=0,  # a retry would hide a failure
            http_client=openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout),
            timeout=timeout,
        ) as client:
            if warmup is not None:
                await self._all(client, warmup)
                self.outcomes, self.with_usage = [], 0
            self._start = time.perf_counter()
            await self._all(client, self.load, self.report)

    async def _all(self, client: Any, load: Load, report: Callable[[int], None] = lambda ended: None) -> None:
        requests = _Sender(self, client, load, report)
        await (requests.open_loop() if load.is_open else requests.closed_loop())


class _Sender:
    """Sends the requests of one load."""

    def __init__(self, run: _Run, client: Any, load: Load, report: Callable[[int], None]) -> None:
        self.run, self.client, self.load, self.report = run, client, load, report
        self._ended = 0

    async def open_loop(self) -> None:
        """Each request at its time, whatever became of those before."""
        room = asyncio.Semaphore(self.load.concurrency) if self.load.concurrency else None
        tasks: set[asyncio.Task[None]] = set()
        for planned in self.load.planned():
            assert planned.at_s is not None
            if (early := planned.at_s - self.run.now()) > 0:
                await asyncio.sleep(early)
            outcome = self._due(planned, planned.at_s)
            task = asyncio.create_task(self._when_there_is_room(room, outcome))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

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
        except (asyncio.TimeoutError, openai.APITimeoutError):
            outcome.fail(TIMEOUT, f"no end within {self.run.server.timeout_s:g} s", self.run.now())
        except Exception as error:  # a library and a server may do anything: it is one request's failure
            kind = _kind_of(error)
            if kind == REFUSED and outcome.token_s:
                kind = BROKEN
            outcome.fail(kind, _sentence(error), self.run.now())
        self._ended += 1
        self.report(self._ended)

    async def _streamed(self, outcome: Outcome) -> None:
        stream = await self._sent(outcome)
        seen = _Seen()
        try:
            async for chunk in _chunks(stream):
                if seen.take(chunk):
                    outcome.token_s.append(self.run.now())
        finally:
            await stream.close()
        self._concluded(outcome, seen)

    def _concluded(self, outcome: Outcome, seen: _Seen) -> None:
        """A stream has ended without an error: with an answer, or with less."""
        if not seen.finished:
            outcome.fail(BROKEN, "the stream ended without a finish_reason", self.run.now())
            return
        if not outcome.token_s:
            outcome.fail(EMPTY, "the answer has no tokens", self.run.now())
            return
        outcome.output_tokens = seen.output_tokens or len(outcome.token_s)
        outcome.prompt_tokens = seen.prompt_tokens or outcome.prompt_tokens
        self.run.with_usage += seen.output_tokens is not None
        outcome.succeed(self.run.now())

    def _sent(self, outcome: Outcome) -> Coroutine[Any, Any, Any]:
        text = prompt_of(outcome.prompt_tokens, np.random.default_rng([self.load.seed, 3, outcome.index]))
        common: dict[str, Any] = {
            "model": self.run.server.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": outcome.asked_tokens,
            "extra_body": self.run.server.extra_body or None,
        }
        if self.run.server.endpoint == "chat":
            sent: Coroutine[Any, Any, Any] = self.client.chat.completions.create(
                messages=[{"role": "user", "content": text}], **common
            )
            return sent
        sent = self.client.completions.create(prompt=text, **common)
        return sent


class _Seen:
    """What the pieces of a stream have said so far."""

    def __init__(self) -> None:
        self.finished = False
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None

    def take(self, chunk: Any) -> bool:
        """Notes what a piece says; true when it carries some of the answer."""
        if (usage := getattr(chunk, "usage", None)) is not None:
            self.output_tokens = getattr(usage, "completion_tokens", None) or self.output_tokens
            self.prompt_tokens = getattr(usage, "prompt_tokens", None) or self.prompt_tokens
        choices = getattr(chunk, "choices", None) or []
        if not choices:
            return False
        self.finished = self.finished or choices[0].finish_reason is not None
        delta = getattr(choices[0], "delta", None)
        said = (getattr(choices[0], "text", None), *(getattr(delta, name, None) for name in ("content", "reasoning_content")))
        return any(said) or bool(getattr(delta, "tool_calls", None))


async def _chunks(stream: Any) -> AsyncIterator[Any]:
    """The pieces of a stream; what breaks it after it began is a broken stream."""
    try:
        async for chunk in stream:
            yield chunk
    except openai.APITimeoutError:
        raise
    except openai.APIConnectionError as error:
        raise _Broken(_sentence(error)) from error


class _Broken(Exception):
    """A stream broke off."""


def _kind_of(error: Exception) -> str:
    """The name that a failure is counted under."""
    if isinstance(error, _Broken):
        return BROKEN
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, openai.APITimeoutError):
        return TIMEOUT
    if isinstance(error, openai.APIConnectionError | OSError):
        return REFUSED
    if isinstance(error, openai.APIError):
        return "error in the stream"
    return MALFORMED if isinstance(error, ValueError | AttributeError | TypeError | KeyError) else type(error).__name__


def _sentence(error: BaseException) -> str:
    """An error and what it came from, in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    why = " ".join(str(cause).split()) if cause is not None else ""
    return f"{said} ({why})"[:_SENTENCE] if why and why not in said else said[:_SENTENCE]


def prompt_of(tokens: int, rng: np.random.Generator) -> str:
    """A text of so many random words: about so many tokens of most tokenizers, and different for every request.

    The server says how many tokens it counted, and results hold that number where it does.
    """
    return " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), tokens))
