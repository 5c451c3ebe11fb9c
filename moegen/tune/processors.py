"""What tuning has to know of targets `llvm`: processors, this machine's or others'. `kinds` describes the functions."""

from __future__ import annotations

from typing import Any

from .. import choices, machine, plan
from ..config import MoEConfig
from ..errors import MeasureError, TargetError
from ..records import Provenance
from ..target import Target, host_arch, missing_features, usable_processors
from .space import Space

WORKER = "worker"


def space(config: MoEConfig, target: Target, regime: str) -> Space:
    """The candidates of a regime."""
    return Space(config, target, regime)


def tokens(config: MoEConfig, regime: str) -> tuple[int, ...]:
    """Where a regime is measured."""
    return choices.tokens_of(config, regime)


def provenance() -> Provenance:
    """What times measured here depend on."""
    return plan.provenance()


def versions() -> dict[str, str]:
    """Versions of everything that decides the code."""
    return plan.versions()


def name() -> str:
    """The processor."""
    return machine.processor()


def admitted(name: str) -> str:
    """Any processor's times are its own."""
    return name


def threads(wanted: int | None) -> int:
    """Threads of the measured layers, all processors when nothing else is wanted."""
    processors = usable_processors()
    if (wanted or 0) > processors:
        raise MeasureError(f"threads={wanted} is more than the {processors} processors that may be used: ask for fewer")
    return wanted or processors


def cache_bytes() -> int:
    """Of the last-level cache."""
    return machine.this_machine().l3_bytes


def facts() -> dict[str, Any]:
    """Sizes that records keep."""
    here = machine.this_machine()
    return {"memory_bytes": here.memory_bytes, "l3_bytes": here.l3_bytes}


def runs_here(target: Target) -> bool:
    """Whether this machine runs what is compiled for a target."""
    return target.arch == host_arch() and not missing_features(target)


def check_here(config: MoEConfig, target: Target) -> None:
    """Raises a TargetError for a target that cannot be measured here."""
    if not runs_here(target):
        raise TargetError(f"{target} does not run on this machine, so that nothing can be measured: tune where it runs")
