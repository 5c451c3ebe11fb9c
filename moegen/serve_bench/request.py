"""What a load test is asked for: a target, a load, an objective, and how often."""

from __future__ import annotations

import dataclasses
import math
import os

from ..bench.contenders.roster import chosen_families
from ..bench.request import Subject
from ..bench.workload import ROUTINGS
from ..errors import MeasureError
from ..target import usable_processors
from .arrivals import Load
from .arrivals import check as check_load
from .batching import Limits, check_limits
from .summary import Objective

ENDPOINTS = ("chat", "completions")
_MOST_WARMUP = 10_000


@dataclasses.dataclass(frozen=True)
class ServerTarget:
    """An OpenAI-compatible server.

    Args:
        url: base of the API, e.g. http://127.0.0.1:8000/v1.
        model: the model's name there; None for the only one that the server lists.
        endpoint: `chat` or `completions`.
        timeout_s: a request that has not ended after so long has failed.
        api_key: None for $OPENAI_API_KEY, or for none. Results do not hold it.
        extra_body: more fields of each request, e.g. {"ignore_eos": True}.
    """

    url: str
    model: str | None = None
    endpoint: str = "chat"
    timeout_s: float = 120.0
    api_key: str | None = dataclasses.field(default=None, repr=False)
    extra_body: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerTarget:
    """A layer in continuous batching, on this machine.

    Args:
        subject: the layer.
        threads: threads of every contender; None for all processors.
        routing: `uniform` or `zipf`.
        against: who else plays the same load: `none`, `all`, or names of families or contenders with commas between.
        limits: what a step of the layer may hold.
        most_seconds: a turn is cut off after so long.
        patience_seconds: a contender that does not answer for so long counts as hung.
        memory_bytes: memory that weights may take; None for most of what is available.
        store: where compiled layers are; None for the user's store.
    """

    subject: Subject
    threads: int | None = None
    routing: str = "uniform"
    against: str = "none"
    limits: Limits = dataclasses.field(default_factory=Limits)
    most_seconds: float = 600.0
    patience_seconds: float = 300.0
    memory_bytes: int | None = None
    store: str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """What to send, and what to make of it.

    Args:
        load: the requests.
        warmup: requests that are sent before, one after the other, and not counted.
        objective: what a request has to keep to be counted as good.
        rounds: turns of each contender, each with requests of its own, the same for all; a server has turns as well.
    """

    load: Load
    warmup: int = 2
    objective: Objective = dataclasses.field(default_factory=Objective)
    rounds: int = 1

    def warmup_load(self) -> Load | None:
        """The requests of the warm-up: of the load's sizes, and other ones than it has."""
        if not self.warmup:
            return None
        return Load(
            concurrency=1, prompt=self.load.prompt, output=self.load.output, requests=self.warmup, seed=self.load.seed + 2**31
        )


def check(target: ServerTarget | LayerTarget, asked: LoadRequest) -> None:
    """Refuses what cannot be measured.

    Raises:
        MeasureError: a number is out of range, or there are more threads than processors.
        ConfigError: an unknown contender.
    """
    check_load(asked.load)
    if not 0 <= asked.warmup <= _MOST_WARMUP:
        raise MeasureError(f"warmup={asked.warmup} must be between 0 and {_MOST_WARMUP} requests")
    if asked.rounds < 1:
        raise MeasureError(f"rounds={asked.rounds} must be at least 1")
    for name, limit in dataclasses.asdict(asked.objective).items():
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise MeasureError(f"{name}={limit} must be a finite number of seconds above 0")
    if isinstance(target, ServerTarget):
        if target.endpoint not in ENDPOINTS:
            raise MeasureError(f"endpoint={target.endpoint!r} must be one of {', '.join(ENDPOINTS)}")
        if not (math.isfinite(target.timeout_s) and target.timeout_s > 0):
            raise MeasureError(f"timeout={target.timeout_s} must be a finite number of seconds above 0")
        return
    _check_layer(target)


def _check_layer(target: LayerTarget) -> None:
    made = target.subject.artifact
    if made is not None and made.target.kind != "llvm":
        raise MeasureError(f"{made.name} is for {made.target.kind}: loads are played through layers for processors only")
    check_limits(target.limits)
    chosen_families(target.against)
    if target.routing not in ROUTINGS:
        raise MeasureError(f"routing={target.routing!r} must be one of {', '.join(ROUTINGS)}")
    processors = usable_processors()
    if target.threads is not None and not 1 <= target.threads <= processors:
        raise MeasureError(f"threads={target.threads} must be between 1 and the {processors} processors that may be used")
    for name, seconds in (("most_seconds", target.most_seconds), ("patience_seconds", target.patience_seconds)):
        if not seconds > 0:
            raise MeasureError(f"{name}={seconds} must be above 0")
