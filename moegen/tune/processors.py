"""What tuning has to know of targets `llvm`: processors, this machine's or others'. `kinds` describes the functions."""

from __future__ import annotations

from collections.abc import Mapping

from .. import choices, machine, plan
from ..config import MoEConfig
from ..errors import MeasureError, TargetError
from ..records import Provenance
from ..target import Target, host_arch, host_cpu_flags, missing_features, usable_processors
from .measurers import HERE, Measurer
from .space import Space

WORKER = "worker"
HELPER = "processors"
WHAT = "processor"
_GENERATION = ("cpu family", "model", "stepping")  # virtual machines leave the name of many in common


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


def here() -> Measurer:
    """This machine's processor."""
    found = machine.this_machine()
    facts = {"memory_bytes": found.memory_bytes, "l3_bytes": found.l3_bytes}
    flags = tuple(sorted(host_cpu_flags()))
    return Measurer(machine.processor(), HERE, found.l3_bytes, found.memory_bytes, facts, found.processors, flags)


def elsewhere(server: str, fields: Mapping[str, str]) -> Measurer:
    """A server's processor, by what the helper says of it (`templates/tune/processors.cc`)."""
    parts = [f"{name} {fields[name]}" for name in _GENERATION if name in fields]
    memory_bytes, l3_bytes = int(fields["memory_bytes"]), int(fields["l3_bytes"]) or machine.this_machine().l3_bytes
    facts = {"memory_bytes": memory_bytes, "l3_bytes": l3_bytes}
    name = ", ".join([fields.get("model name", "unknown"), *parts])
    flags = tuple(fields.get("flags", "").split())
    return Measurer(name, server, l3_bytes, memory_bytes, facts, int(fields["processors"]), flags)


def admitted(name: str) -> str:
    """Any processor's times are its own."""
    return name


def threads(wanted: int | None) -> int:
    """Threads of the measured layers, all processors when nothing else is wanted."""
    processors = usable_processors()
    if (wanted or 0) > processors:
        raise MeasureError(f"threads={wanted} is more than the {processors} processors that may be used: ask for fewer")
    return wanted or processors


def runs_here(target: Target) -> bool:
    """Whether this machine runs what is compiled for a target."""
    return target.arch == host_arch() and not missing_features(target)


def check(config: MoEConfig, target: Target, by: Measurer) -> None:
    """Raises a TargetError or a MeasureError for a target that a processor does not run."""
    if by.where == HERE and not runs_here(target):
        raise TargetError(f"{target} does not run on this machine, so that nothing can be measured: tune where it runs")
    if missing := missing_features(target, frozenset(by.flags)):
        raise MeasureError(
            f"{by.where} lacks {', '.join(missing)}, which code for {target.mcpu} needs: "
            "take servers of another key, or tune for another --mcpu"
        )
