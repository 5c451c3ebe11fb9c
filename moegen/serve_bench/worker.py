"""The process that a family of contenders serves in: it plays a load through one of them, and says how far it is.

    python -m moegen.serve_bench.worker MODULE SETTINGS-AS-JSON REQUESTS-FD REPLIES-FD

SIGINT ends the load that is being played; what was measured is answered all the same.
"""

from __future__ import annotations

import json
import pathlib
import signal
import time
from typing import Any

import numpy as np

from ..arrays import HostArray, empty_aligned
from ..bench.contenders.family import Family, poison
from ..bench.contenders.worker import Say, main
from ..bench.workload import read_batches
from .arrivals import Load
from .batching import Batcher, Call, Kept, Limits

_SAY_SECONDS = 0.2


class Server:
    """A family and the tokens that requests bring."""

    answers = ("play",)

    def __init__(self, family: Family, say: Say) -> None:
        self.family, self.say = family, say
        self.pool: HostArray | None = None
        self.interrupted = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True

    def play(
        self,
        name: str,
        load: dict[str, Any],
        warmup: dict[str, Any] | None,
        limits: dict[str, int],
        pool_tokens: int,
        keep: list[int],
        most_seconds: float,
        to: str,
    ) -> dict[str, Any]:
        """Plays a load through contender `name` after a warm-up, and writes its outcomes and kept outputs to files.

        Args:
            load, warmup, limits: fields of `Load` and `Limits`.
            pool_tokens: size of the workload's batches that requests take their tokens from.
            keep: requests of which some outputs are kept.
            most_seconds: the load is cut off after so long.
            to: `.json` and `.npy` files of this name are written.
        """
        self.interrupted = False
        if self.pool is None:
            self.pool = read_pool(self.family.settings.folder, pool_tokens)
        call = self._call(name)
        batcher = Batcher(call, self.pool, Limits(**limits))
        self._warm_up(batcher, call, warmup, limits["batch_tokens"])
        start = said = time.monotonic()
        ended = 0

        def stop() -> bool:
            nonlocal said
            now = time.monotonic()
            if now - said > _SAY_SECONDS:
                said = now
                self.say({"ended": ended})
            return self.interrupted or now - start > most_seconds

        def report(count: int) -> None:
            nonlocal ended
            ended = count

        played, kept = batcher.play(Load(**load), keep=frozenset(keep), stop=stop, report=report)
        alone = [_alone(call, self.pool, one) for one in kept]
        outcomes = [outcome.to_dict() for outcome in played.outcomes]
        pathlib.Path(f"{to}.json").write_text(json.dumps(outcomes), encoding="utf-8")
        hidden = self.pool.shape[1]
        np.save(f"{to}.npy", np.concatenate([np.empty((0, hidden), self.pool.data.dtype), *(one.outputs for one in kept)]))
        return {
            "seconds": played.seconds,
            "interrupted": self.interrupted,
            "cut_off": played.interrupted and not self.interrupted,
            "facts": played.facts,
            "rows": [row for one in kept for row in one.rows],
            "same_alone": all(alone) if alone else None,
        }

    def _call(self, name: str) -> Call:
        call, wrap = self.family.calls[name], self.family.wrap
        return lambda x, out: call(wrap(x), wrap(out))

    def _warm_up(self, batcher: Batcher, call: Call, warmup: dict[str, Any] | None, batch_tokens: int) -> None:
        """Full steps and steps of one token first: they start threads, take memory, and compile what a library compiles."""
        assert self.pool is not None
        for tokens in (batch_tokens, 1):
            rows = np.arange(tokens) % len(self.pool.data)
            _run(call, self.pool, rows)
        if warmup is not None:
            batcher.play(Load(**warmup), stop=lambda: self.interrupted)


def read_pool(folder: pathlib.Path, tokens: int) -> HostArray:
    """[N, H], the tokens that requests bring: all batches of a size of the workload, one behind the other."""
    batches = read_batches(folder, tokens)
    return HostArray(np.concatenate([batch.data for batch in batches]), batches[0].dtype)


def _run(call: Call, pool: HostArray, rows: Any) -> HostArray:
    """The outputs of some rows of the pool in a call of their own, written over NaN."""
    shape = (len(rows), pool.shape[1])
    x, out = (HostArray(empty_aligned(shape, pool.data.dtype), pool.dtype) for _ in range(2))
    x.data[...] = pool.data[rows]
    poison(out)
    call(x, out)
    return out


def _alone(call: Call, pool: HostArray, kept: Kept) -> bool:
    """Whether the same rows without the other requests give bitwise the same."""
    alone = _run(call, pool, kept.rows)
    return alone.data.tobytes() == np.ascontiguousarray(kept.outputs).tobytes()


if __name__ == "__main__":
    main(Server)
