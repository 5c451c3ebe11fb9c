"""What a module is compiled for: `Target`, frozen, with the limits that schedules need and the CPU features that loading needs."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from typing import Any

KINDS = ("llvm", "cuda")
ARCHS = ("x86_64", "aarch64")

# LLVM feature -> flag in /proc/cpuinfo, for the features that change which instructions are emitted.
X86_FEATURES = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "avx": "avx", "avx2": "avx2",
    "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2", "lzcnt": "abm", "movbe": "movbe", "avxvnni": "avx_vnni",
    "avx512f": "avx512f", "avx512cd": "avx512cd", "avx512bw": "avx512bw", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16", "avx512vp2intersect": "avx512_vp2intersect", "gfni": "gfni", "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A compilation target.

    Args:
        kind: `llvm` (CPU) or `cuda`.
        mcpu: processor name as LLVM knows it (`znver5`, `x86-64-v3`, ...); for `cuda`, the architectures in one word.
        arch: machine architecture as `platform.machine()` names it.
        features: LLVM features that the compiled code may use, out of those in `X86_FEATURES`.
        disabled: features of `mcpu` that this machine lacks and that are switched off.
        lanes: float32 lanes of a vector register.
        registers: number of vector registers.
        gpus: for `cuda`, the architectures that there is machine code for (`sm_90`, ...); `arch` is the machine's around them.
        tf32: for `cuda`, multiply float32 on tensor cores, rounded to 10 bits of mantissa.
    """

    kind: str
    mcpu: str
    arch: str
    features: tuple[str, ...]
    disabled: tuple[str, ...]
    lanes: int
    registers: int
    gpus: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def slug(self) -> str:
        """Short name for folders and file names."""
        return f"{self.kind}-{self.mcpu}{'-tf32' if self.tf32 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("features", "disabled", "gpus")}
        known = dataclasses.asdict(self) | lists
        return known if self.gpus else {name: value for name, value in known.items() if name not in ("gpus", "tf32")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Target:
        """The inverse of `to_dict`."""
        return cls(**fields | {name: tuple(fields.get(name, ())) for name in ("features", "disabled", "gpus")})

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.kind} -arch={','.join(self.gpus)}{' -tf32' if self.tf32 else ''}"
        triple = "" if self.arch == "x86_64" else f" -mtriple={triple_of(self.arch)}"
        return f"{self.kind}{triple} -mcpu={self.mcpu}"


@functools.cache
def host_cpu_flags() -> frozenset[str]:
    """Flags of this machine's processor as /proc/cpuinfo lists them; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def missing_features(target: Target, flags: frozenset[str] | None = None) -> list[str]:
    """Features that `target` needs and a machine with these flags in its /proc/cpuinfo does not have; None for this machine."""
    flags = host_cpu_flags() if flags is None else flags
    return [f for f in target.features if X86_FEATURES[f] not in flags] if target.arch == "x86_64" else []


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_arch() -> str:
    """This machine's architecture, `x86_64` or `aarch64` on the usual ones."""
    machine = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def triple_of(arch: str) -> str:
    """LLVM's name of a Linux machine of this architecture."""
    return f"{arch}-linux-gnu"


def vectors_of(arch: str, features: tuple[str, ...]) -> tuple[int, int]:
    """(float32 lanes, number) of the vector registers that code with these LLVM features uses."""
    if arch == "x86_64":
        if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= set(features):
            return 16, 32
        return (8, 16) if "avx2" in features and "fma" in features else (4, 16)
    return 4, 32
