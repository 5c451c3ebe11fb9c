"""What a host has to know of compiled kernels: plain values, so that running them needs no compiler."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..schedules.cuda.hopper import TensorMap


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
class HopperKernel:
    """One grouped product that Hopper computes in place of a stage's own kernel.

    The grid is one-dimensional: one block for each multiprocessor, and `grid` (int32) says how many there are. More would wait
    for their turn, fewer are right as well.

    Args:
        stage: whose place it takes, `up_128`.
        symbol: its name in the machine code.
        arguments: names in the order of its parameters. Tensor maps are passed by value; the other names are device pointers,
            but for `grid`. An argument of the layer that the kernel does not use has no parameter.
        tensor_maps: how those are encoded.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
        script: the module in TVM script that it was compiled from.
    """

    stage: str
    symbol: str
    arguments: tuple[str, ...]
    tensor_maps: tuple[TensorMap, ...]
    threads: int
    shared_bytes: int
    script: str

    @property
    def side(self) -> str:
        """`up` or `down`."""
        return self.stage.partition("_")[0]

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return int(self.stage.rpartition("_")[2])


@dataclasses.dataclass(frozen=True)
class HopperProgram:
    """CUDA C++ source for `sm_90a`, which allows approximate division and flushed denormals, and the kernels in it."""

    source: str
    kernels: tuple[HopperKernel, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """The CUDA C++ source of a layer, and its stages."""

    source: str
    stages: dict[str, Stage]

    def describe(self) -> dict[str, Any]:
        """The stages as plain JSON values."""
        return {name: dataclasses.asdict(stage) for name, stage in self.stages.items()}
