"""NVIDIA's GPU architectures: their names, their limits, and which device runs code that was compiled for which of them.

Limits are those of the CUDA C++ programming guide, "Compute Capabilities", tables "Feature Support per Compute Capability" and
"Technical Specifications per Compute Capability"; blocks per multiprocessor also as CUDA 13.0's cuda_occupancy.h has them.
Which instructions begin where is in the PTX ISA, under "Target ISA Notes" of each instruction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from ..errors import TargetError

Capability = tuple[int, int]

WARP_THREADS = 32
RESERVED_SHARED_BYTES = 1024  # of each block's shared memory, kept by the system

_NAME = re.compile(r"sm_(\d{2,3})([a-z]?)")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What machine code is compiled for. All that are known have cp.async, ldmatrix and mma.sync of bfloat16, float16 and tf32.

    Args:
        name: `sm_80`, or `sm_90a` with what only this architecture has.
        capability: compute capability, (major, minor).
        shared_bytes_per_sm: shared memory of a multiprocessor.
        max_threads_per_sm: threads that a multiprocessor holds at once.
        max_blocks_per_sm: blocks that a multiprocessor holds at once.
        tegra: of a system on a chip, whose machine code and that of other GPUs do not run on one another.
        registers_per_sm: 32-bit registers of a multiprocessor; one block may use all.
        max_registers_per_thread: 32-bit registers.
        max_threads_per_block: of all three dimensions together.
    """

    name: str
    capability: Capability
    shared_bytes_per_sm: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    tegra: bool = False
    registers_per_sm: int = 65536
    max_registers_per_thread: int = 255
    max_threads_per_block: int = 1024

    @property
    def max_shared_bytes_per_block(self) -> int:
        """Shared memory of one block; beyond 48 KiB it has to be dynamic and asked for."""
        return self.shared_bytes_per_sm - RESERVED_SHARED_BYTES

    def blocks(self, shared_bytes: int) -> int:
        """Thread blocks with so much shared memory that a multiprocessor holds at once."""
        return min(self.max_blocks_per_sm, self.shared_bytes_per_sm // (shared_bytes + RESERVED_SHARED_BYTES))

    @property
    def specific(self) -> bool:
        """Whether code runs on this very compute capability only (`sm_90a`)."""
        return self.name.endswith("a")

    @property
    def plain(self) -> Architecture:
        """The same without what only this architecture has, so that later devices run its PTX (`sm_90` of `sm_90a`)."""
        return KNOWN[self.name.removesuffix("a")]

    @property
    def virtual(self) -> str:
        """The name of its PTX, `compute_80`."""
        return self.name.replace("sm_", "compute_")

    @property
    def has_tma(self) -> bool:
        """Whether there are copies of whole tensors' tiles (cp.async.bulk.tensor) and thread block clusters."""
        return self.capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        """Whether four warps multiply matrices together (wgmma.mma_async): Hopper has it, and no later architecture."""
        return self.name == "sm_90a"

    def runs_on(self, device: Capability) -> bool:
        """Whether a device of this compute capability runs machine code (a cubin) for this architecture.

        Machine code runs within its major version, on its own minor version and later ones ("Binary Compatibility" in the guide).
        """
        if device == self.capability:
            return True
        return not (self.specific or self.tegra or _tegra(device)) and device[0] == self.capability[0] and device > self.capability

    def ptx_runs_on(self, device: Capability) -> bool:
        """Whether a device's driver can compile PTX for this architecture: any later one can, unless the PTX is `specific`.

        The driver has to be as new as the compiler that made the PTX ("PTX Compatibility" in the guide).
        """
        return device == self.capability if self.specific else device >= self.capability

    def __str__(self) -> str:
        return self.name


# Compute capability -> KiB of shared memory, threads and blocks of a multiprocessor.
_LIMITS = {
    (8, 0): (164, 2048, 32), (8, 6): (100, 1536, 16), (8, 7): (164, 1536, 16), (8, 9): (100, 1536, 24),
    (9, 0): (228, 2048, 32), (10, 0): (228, 2048, 32), (10, 3): (228, 2048, 32), (11, 0): (228, 1536, 24),
    (12, 0): (100, 1536, 24), (12, 1): (100, 1536, 24),
}  # fmt: skip
_TEGRA = {(8, 7), (11, 0)}


def _known() -> dict[str, Architecture]:
    every = {}
    for capability, (shared_kib, threads, blocks) in _LIMITS.items():
        name = "sm_{}{}".format(*capability)
        for suffix in ("", "a") if capability >= (9, 0) else ("",):
            limits = (shared_kib * 1024, threads, blocks, capability in _TEGRA)
            every[name + suffix] = Architecture(name + suffix, capability, *limits)
    return every


KNOWN = _known()


def _tegra(device: Capability) -> bool:
    return device in _TEGRA


def parse(names: Iterable[str]) -> tuple[Architecture, ...]:
    """The architectures of these names, each once, those before others that a device which runs both should take first.

    Raises:
        TargetError: there is none, or a name is malformed, unknown, or of an architecture that is too old.
    """
    chosen = {_parse(name) for name in names}
    if not chosen:
        raise TargetError(f"no architecture to compile for; known are {', '.join(KNOWN)}")
    return tuple(sorted(chosen, key=lambda one: (one.capability, one.specific), reverse=True))


def _parse(name: str) -> Architecture:
    if name in KNOWN:
        return KNOWN[name]
    matched = _NAME.fullmatch(name)
    if not matched:
        raise TargetError(f"architecture {name!r}: expected a name such as sm_80 or sm_90a; known are {', '.join(KNOWN)}")
    if int(matched[1]) < 80:
        why = "is too old: kernels need cp.async and mma.sync of bfloat16, which begin with sm_80"
        raise TargetError(f"architecture {name!r} {why}; known are {', '.join(KNOWN)}")
    raise TargetError(f"architecture {name!r} is unknown; known are {', '.join(KNOWN)}")


def choose(architectures: Sequence[Architecture], device: Capability) -> Architecture | None:
    """The one whose machine code a device of this compute capability should run; None where it can run none of them."""
    able = [one for one in architectures if one.runs_on(device)]
    return max(able, key=lambda one: (one.capability, one.specific), default=None)
