"""What a host has to know of compiled kernels: plain values, so that running them needs no compiler."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel's parameter.

    Args:
        name: of the tensor or the number in the stage's definition.
        pointer: whether it is an address; otherwise a number.
        type: as CUDA C++ writes it, without the asterisk.
    """

    name: str
    pointer: bool
    type: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Args:
        symbol: its name in the machine code.
        parameters: in order.
        grid: thread blocks along x, y, z, as C++ expressions of the stage's symbolic sizes.
        block: threads along x, y, z.
        shared_bytes: dynamic shared memory.
    """

    symbol: str
    parameters: tuple[Parameter, ...]
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    shared_bytes: int = 0

    @property
    def threads(self) -> int:
        """Of a thread block."""
        x, y, z = self.block
        return x * y * z


@dataclasses.dataclass(frozen=True)
class Intermediate:
    """A buffer between the launches of one stage.

    Args:
        bytes: its size, as a C++ expression of the stage's symbolic sizes.
    """

    name: str
    bytes: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its launches in order, and what they hand on to one another."""

    name: str
    kernels: tuple[Kernel, ...]
    intermediates: tuple[Intermediate, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """The CUDA C++ source of a layer, and its stages."""

    source: str
    stages: dict[str, Stage]

    def describe(self) -> dict[str, Any]:
        """The stages as plain JSON values."""
        return {name: dataclasses.asdict(stage) for name, stage in self.stages.items()}
