"""What measures: this machine's processor or device, or another machine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

HERE = "this machine"


@dataclasses.dataclass(frozen=True)
class Measurer:
    """A processor or device as far as measuring has to know it; plain values, which go from one process to another as JSON.

    Args:
        name: as records have it.
        where: `this machine`, or `the server HOST:PORT`.
        cache_bytes: of the last-level cache. Weights have to exceed it together, so that a call does not find them where the last
            one left them.
        memory_bytes: all memory.
        facts: sizes that records keep.
        processors: that a layer may use; 1 of a device.
        flags: of a processor, as /proc/cpuinfo names its features.
        capability: compute capability of a CUDA device, (major, minor).
    """

    name: str
    where: str
    cache_bytes: int
    memory_bytes: int
    facts: Mapping[str, Any]
    processors: int = 1
    flags: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Measurer:
        """From what `dataclasses.asdict` and JSON made of one."""
        major, minor = told["capability"]
        return cls(**{**told, "flags": tuple(told["flags"]), "capability": (int(major), int(minor))})
