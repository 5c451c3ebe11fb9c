"""What a benchmark is asked for: layers, numbers of tokens and threads, contenders, and how long to measure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ..artifact import Artifact
from ..config import MoEConfig
from ..errors import MeasureError
from ..presets import preset
from ..target import usable_processors
from .contenders.roster import chosen_families
from .workload import ROUTINGS

TOKENS = (1, 4, 16, 64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        rounds: turns of each contender.
        min_ms: milliseconds of calls in a turn, at least one call.
        most_seconds: a contender that has called for so long gets no more turns.
        most_call_seconds: a contender that took longer for one call is left out at larger points.
        patience_seconds: a contender that does not answer for so long counts as hung.
        quiet_rounds: end before `rounds`, once every contender had so many quiet rounds; 0 for always all of them.
        quiet_share: a round is quiet for a contender when neither it nor moegen waited for a processor for more than this share
            of its turn: other processes had it.
    """

    rounds: int = 10
    min_ms: float = 20.0
    most_seconds: float = 10.0
    most_call_seconds: float = 5.0
    patience_seconds: float = 300.0
    quiet_rounds: int = 0
    quiet_share: float = 0.1


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer to measure.

    Args:
        label: what tables call it.
        config: the layer.
        preset: the preset's name, whose sizes may be reduced to fit into memory; None for a layer of the user's own.
        artifact: the compiled layer; None to build it, or find it built.
    """

    label: str
    config: MoEConfig
    preset: str | None = None
    artifact: Artifact | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure and how.

    Args:
        tokens: numbers of tokens T, a point each.
        threads: numbers of threads, a run each; empty for all processors.
        routings: `uniform`, `zipf`, a run each.
        against: `all`, `none`, or names of families or contenders with commas between.
        dense: measure all experts for every token beside.
        seed: of weights and tokens.
        effort: how long.
        memory_bytes: memory that weights may take; None for most of what is available.
        store: where compiled layers are; None for the user's store.
    """

    tokens: tuple[int, ...] = TOKENS
    threads: tuple[int, ...] = ()
    routings: tuple[str, ...] = ("uniform",)
    against: str = "all"
    dense: bool = False
    seed: int = 0
    effort: Effort = dataclasses.field(default_factory=Effort)
    memory_bytes: int | None = None
    store: str | os.PathLike[str] | None = None


def preset_subject(name: str, **changes: Any) -> Subject:
    """A preset, with some of its fields changed.

    Raises:
        ConfigError: there is no such preset, or a change makes it illegal.
    """
    return Subject(name, dataclasses.replace(preset(name), **changes), preset=name)


def rounds_in(subjects: Sequence[Subject], asked: Request) -> int:
    """Rounds that a benchmark has, for progress bars."""
    return len(subjects) * len(asked.routings) * len(asked.threads or (0,)) * len(asked.tokens) * asked.effort.rounds


def check(asked: Request) -> None:
    """Refuses what cannot be measured.

    Raises:
        MeasureError: a number is out of range, or there are more threads than processors.
        ConfigError: an unknown contender or routing.
    """
    chosen_families(asked.against)
    for name, values, least in (("tokens", asked.tokens, 1), ("threads", asked.threads, 1), ("rounds", (asked.effort.rounds,), 1)):
        if too_few := [value for value in values if value < least]:
            raise MeasureError(f"{name}={too_few[0]} must be at least {least}")
    processors = usable_processors()
    if too_many := [count for count in asked.threads if count > processors]:
        raise MeasureError(f"threads={too_many[0]} is more than the {processors} processors that may be used: ask for fewer")
    if unknown := [routing for routing in asked.routings if routing not in ROUTINGS]:
        raise MeasureError(f"routing={unknown[0]!r} must be one of {', '.join(ROUTINGS)}")
