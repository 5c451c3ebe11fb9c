"""Which requests come, when, and of which sizes: drawn from a seed, or read from a file. Nothing here measures.

In an open loop requests come at times of their own, however slow the answers are; in a closed loop each of so many clients
sends its next request when it has the answer to the one before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import MeasureError
from .sizes import MOST_TOKENS, parse

MOST_REQUESTS = 1_000_000
# Of a line of a trace: this module's names, and those of Mooncake's traces, whose times are in milliseconds.
_AT, _PROMPT, _OUTPUT = ("at_s", "timestamp"), ("prompt_tokens", "input_length"), ("output_tokens", "output_length")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request that is to be sent.

    Args:
        index: its place in the run, from 0.
        at_s: seconds after the start at which it comes; None in a closed loop.
        prompt_tokens: tokens that it brings.
        output_tokens: tokens that it asks for; the prompt gives the first, every further one takes a step of its own.
    """

    index: int
    at_s: float | None
    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Load:
    """The requests of a run; the same fields give the same requests.

    Args:
        rate_per_s: requests a second of an open loop; None for a closed one.
        concurrency: clients of a closed loop; in an open one, requests that may be under way at once, None for any number.
        burstiness: 1 for Poisson arrivals. Gaps between requests are drawn from a gamma distribution of this shape: below 1
            they come in bursts, above 1 more evenly.
        prompt, output: sizes as `moegen.serve_bench.sizes.parse` reads them.
        requests: how many at most; None for no limit.
        duration_s: no request comes later than this; None for no limit.
        seed: of times and sizes.
        trace: a file with a request on each line; then there are no rate, sizes and seed.
    """

    rate_per_s: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0
    prompt: str = "16-256"
    output: str = "4-64"
    requests: int | None = None
    duration_s: float | None = None
    seed: int = 0
    trace: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests come however slow the answers are."""
        return self.rate_per_s is not None or self.trace is not None

    def planned(self) -> Iterator[Planned]:
        """The requests in the order in which they come. In a closed loop of some duration, whoever sends them stops asking.

        Raises:
            MeasureError: as `check` does.
        """
        source = _drawn(self) if self.trace is None else _replayed(pathlib.Path(self.trace))
        for planned in source:
            if self.requests is not None and planned.index >= self.requests:
                return
            if self.duration_s is not None and planned.at_s is not None and planned.at_s >= self.duration_s:
                return
            yield planned

    def with_seed(self, seed: int) -> Load:
        """The same load, drawn from another seed."""
        return dataclasses.replace(self, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def check(load: Load) -> None:
    """Refuses a load that cannot be sent.

    Raises:
        MeasureError: a number is out of range, a size cannot be read, a trace is missing or malformed, or nothing ends the run.
    """
    positive = {"rate": load.rate_per_s, "burstiness": load.burstiness, "duration": load.duration_s}
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            hint = "; for as fast as possible, give a concurrency instead" if name == "rate" else ""
            raise MeasureError(f"{name}={value} must be a finite number above 0{hint}")
    for name, count in {"concurrency": load.concurrency, "requests": load.requests}.items():
        if count is not None and not 1 <= count <= MOST_REQUESTS:
            raise MeasureError(f"{name}={count} must be between 1 and {MOST_REQUESTS}")
    if not load.is_open and load.concurrency is None:
        raise MeasureError("give a rate (open loop), a concurrency (closed loop) or a trace")
    if load.rate_per_s is not None and load.trace is not None:
        raise MeasureError(f"rate={load.rate_per_s} and a trace are a schedule each: give one of them")
    if load.requests is None and load.duration_s is None and load.trace is None:
        raise MeasureError("nothing ends the run: give a number of requests or a duration")
    parse("prompt", load.prompt), parse("output", load.output)
    if load.is_open and next(load.planned(), None) is None:
        raise MeasureError(f"no request comes within duration={load.duration_s} s: give a longer one")


# ---------------------------------------------------------------- drawn


def _drawn(load: Load) -> Iterator[Planned]:
    """Times and both sizes have a stream of random numbers each, so that changing one leaves the others."""
    gaps, prompts, outputs = (np.random.default_rng([load.seed, stream]) for stream in range(3))
    prompt, output = parse("prompt", load.prompt), parse("output", load.output)
    at = 0.0
    for index in range(MOST_REQUESTS):
        if load.rate_per_s is not None:
            # The mean gap is shape * scale = 1 / rate; of shape 1, gamma is the exponential distribution of a Poisson process.
            at += float(gaps.gamma(load.burstiness, 1.0 / (load.rate_per_s * load.burstiness)))
        yield Planned(index, None if load.rate_per_s is None else at, prompt.draw(prompts), output.draw(outputs))


# ---------------------------------------------------------------- replayed


def _replayed(path: pathlib.Path) -> Iterator[Planned]:
    """A trace's requests by their times, the first of which is the start."""
    found = [_line(path, number, line) for number, line in _lines(path)]
    if not found:
        raise MeasureError(f"{str(path)!r} holds no requests: each line is one, as JSON")
    found.sort(key=lambda request: request[0])  # stable: requests of one time keep their order
    start = found[0][0]
    for index, (at, prompt, output) in enumerate(found):
        yield Planned(index, at - start, prompt, output)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MeasureError(f"cannot read the trace {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MeasureError(f"the trace {str(path)!r} is not text: {error}") from error
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _line(path: pathlib.Path, number: int, line: str) -> tuple[float, int, int]:
    where = f"line {number} of {str(path)!r}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MeasureError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise MeasureError(f"{where} must be an object with {', '.join(names[0] for names in (_AT, _PROMPT, _OUTPUT))}")
    name, at = _field(where, entry, _AT)
    if isinstance(at, bool) or not isinstance(at, int | float) or not (math.isfinite(at) and at >= 0):
        raise MeasureError(f"{where}: {name}={at!r} must be a time of 0 or more")
    sizes = []
    for names in (_PROMPT, _OUTPUT):
        key, value = _field(where, entry, names)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
            raise MeasureError(f"{where}: {key}={value!r} must be a whole number of 1 to {MOST_TOKENS} tokens")
        sizes.append(value)
    return (at / 1e3 if name == _AT[1] else float(at)), sizes[0], sizes[1]


def _field(where: str, entry: Mapping[str, Any], names: tuple[str, str]) -> tuple[str, Any]:
    name = next((name for name in names if name in entry), None)
    if name is None:
        raise MeasureError(f"{where} has no {names[0]} (nor {names[1]})")
    return name, entry[name]


def write_trace(path: str | os.PathLike[str], load: Load) -> int:
    """Writes the requests of an open loop as a trace; returns how many.

    Raises:
        MeasureError: requests of a closed loop have no times.
    """
    check(load)
    if not load.is_open:
        raise MeasureError("requests of a closed loop have no times that a trace could hold: give a rate")
    lines = [
        json.dumps({"at_s": round(p.at_s or 0.0, 6), "prompt_tokens": p.prompt_tokens, "output_tokens": p.output_tokens})
        for p in load.planned()
    ]
    pathlib.Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)
