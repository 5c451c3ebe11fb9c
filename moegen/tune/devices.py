"""What tuning has to know of targets `cuda`: the first CUDA device, this machine's or another's. `kinds` describes the functions.

An emulated device (`moegen.cuda.emulator`) runs what is compiled for devices, but its times are a processor's: it may check a
layer, and never tune one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import MoEConfig
from ..cuda import choices, hardware, planning
from ..cuda.architectures import KNOWN, choose, parse
from ..cuda.hardware import Device
from ..display import size
from ..errors import MeasureError, TargetError
from ..presets import weight_bytes
from ..records import EMULATED, Provenance
from ..target import Target, host_arch
from .measurers import HERE, Measurer
from .space import CudaSpace

WORKER = "device_worker"
HELPER = "devices"
WHAT = "CUDA device"
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


def here() -> Measurer:
    """This machine's device.

    Raises:
        TargetError: there is none.
    """
    found = hardware.device()
    if found is None:
        raise TargetError(
            "there is no CUDA device here, so that nothing can be measured: run `moegen tune` on the machine with the device, or "
            "with --rpc HOST:PORT --key NAME against servers on such machines"
        )
    return _measurer(found, HERE)


def elsewhere(server: str, fields: Mapping[str, str]) -> Measurer:
    """A server's device, by what the helper says of it (`templates/tune/devices.cc`)."""
    numbers = {name: int(value) for name, value in fields.items() if name != "name"}
    capability = numbers.pop("major"), numbers.pop("minor")
    return _measurer(Device(fields["name"], capability, **numbers), server)


def _measurer(device: Device, where: str) -> Measurer:
    facts = {name: value for name, value in dataclasses.asdict(device).items() if name != "name"}
    facts["capability"] = list(device.capability)  # as JSON has it
    return Measurer(device.name, where, device.l2_bytes, device.memory_bytes, facts, capability=device.capability)


def architecture(by: Measurer) -> str:
    """What `--arch` says for a device: machine code that it runs, and later ones of its kind.

    Raises:
        TargetError: there is none.
    """
    if found := choose([one for one in KNOWN.values() if not one.specific], by.capability):
        return found.name
    raise TargetError(
        f"the {by.name} of {by.where} has compute capability {'.'.join(map(str, by.capability))}; known are {', '.join(KNOWN)}"
    )


def admitted(name: str) -> str:
    """The name of a device whose times may be recorded.

    Raises:
        MeasureError: it is emulated.
    """
    if name.startswith(EMULATED):
        raise MeasureError(f"the CUDA device is {name!r}: its times are those of a processor, and are not recorded")
    return name


def threads(wanted: int | None) -> int:
    """A device has its own."""
    if wanted is not None:
        raise MeasureError(f"threads={wanted} is for CPUs: leave it out for target cuda")
    return 1


def runs_here(target: Target) -> bool:
    """Whether this machine has a device that runs machine code for a target."""
    found = hardware.device()
    return found is not None and target.arch == host_arch() and choose(parse(target.gpus), found.capability) is not None


def check(config: MoEConfig, target: Target, by: Measurer) -> None:
    """Raises a TargetError or a MeasureError for what a device cannot measure."""
    if target.arch != host_arch() or choose(parse(target.gpus), by.capability) is None:
        able = " or ".join(one.name for one in KNOWN.values() if one.capability == by.capability)
        where = "this machine's" if by.where == HERE else f"{by.where}, the"
        raise TargetError(f"{target} does not run on {where} {by.name}: tune with --arch {able or 'of an older device'}")
    if (needed := weight_bytes(config)) > _MEMORY_FRACTION * by.memory_bytes:
        raise MeasureError(f"{size(needed)} of weights do not fit on the {by.name}, which has {size(by.memory_bytes)}")
