"""What tuning has to know of targets `cuda`: this machine's first CUDA device. `kinds` describes the functions.

An emulated device (`moegen.cuda.emulator`) runs what is compiled for devices, but its times are a processor's: it may check a
layer, and never tune one.
"""

from __future__ import annotations

from typing import Any

from ..config import MoEConfig
from ..cuda import choices, hardware, planning
from ..cuda.architectures import KNOWN, choose, parse
from ..cuda.hardware import Device
from ..display import size
from ..errors import MeasureError, TargetError
from ..presets import weight_bytes
from ..records import EMULATED, Provenance
from ..target import Target, host_arch
from .space import CudaSpace

WORKER = "device_worker"
_MEMORY_FRACTION = 0.8


def space(config: MoEConfig, target: Target, regime: str) -> CudaSpace:
    """The candidates of a regime."""
    return CudaSpace(config, target, regime)


def tokens(config: MoEConfig, regime: str) -> tuple[int, ...]:
    """Where a regime is measured."""
    return choices.tokens_of(config, regime)


def provenance() -> Provenance:
    """What times measured here depend on."""
    return planning.provenance()


def versions() -> dict[str, str]:
    """Versions of everything that decides the code."""
    return planning.versions() | {"compiler": planning.nvidia_compiler()}


def name() -> str:
    """The device."""
    return _here().name


def admitted(name: str) -> str:
    """The name of a device whose times may be recorded.

    Raises:
        MeasureError: it is emulated.
    """
    if name.startswith(EMULATED):
        raise MeasureError(f"the CUDA device here is {name!r}: its times are those of a processor, and are not recorded")
    return name


def threads(wanted: int | None) -> int:
    """A device has its own."""
    if wanted is not None:
        raise MeasureError(f"threads={wanted} is for CPUs: leave it out for target cuda")
    return 1


def cache_bytes() -> int:
    """Of the second-level cache."""
    return _here().l2_bytes


def facts() -> dict[str, Any]:
    """Sizes that records keep."""
    return {"memory_bytes": _here().memory_bytes, "l2_bytes": _here().l2_bytes}


def runs_here(target: Target) -> bool:
    """Whether this machine has a device that runs machine code for a target."""
    found = hardware.device()
    return found is not None and target.arch == host_arch() and choose(parse(target.gpus), found.capability) is not None


def check_here(config: MoEConfig, target: Target) -> None:
    """Raises a TargetError or a MeasureError for what cannot be measured here."""
    here = _here()
    if not runs_here(target):
        able = " or ".join(one.name for one in KNOWN.values() if one.capability == here.capability)
        raise TargetError(f"{target} does not run on this machine's {here.name}: tune with --arch {able or 'of an older device'}")
    if (needed := weight_bytes(config)) > _MEMORY_FRACTION * here.memory_bytes:
        raise MeasureError(f"{size(needed)} of weights do not fit on the {here.name}, which has {size(here.memory_bytes)}")


def _here() -> Device:
    found = hardware.device()
    if found is None:
        raise TargetError(
            "there is no CUDA device here, so that nothing can be measured: run `moegen tune` on the machine with the device, "
            "and take its records along with --export and --import"
        )
    return found
