"""What this machine is: processor, caches, memory, how much of the memory may be used, and processes that end with their parent."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import platform
import re
import signal
import sys

from .target import usable_processors

_CPUINFO = pathlib.Path("/proc/cpuinfo")
_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")
_TYPICAL_L3_BYTES = 32 << 20
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine as far as measurements depend on it.

    Args:
        cpu: the processor's name.
        processors: processors that this process may use.
        l3_bytes: size of the last-level cache.
        memory_bytes: all memory.
    """

    cpu: str
    processors: int
    l3_bytes: int
    memory_bytes: int


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu=_field(_text(_CPUINFO), "model name") or platform.processor() or platform.machine(),
        processors=usable_processors(),
        l3_bytes=_l3_bytes(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def available_bytes() -> int:
    """Memory that can be taken without swapping, by the machine's account and by that of the control group."""
    found = re.match(r"(\d+) kB", _field(_text(_MEMINFO), "MemAvailable"))
    available = int(found[1]) << 10 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (_text(_CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def processor() -> str:
    """The processor's name with what tells its generation: virtual machines leave the name of many in common."""
    info = _text(_CPUINFO)
    parts = [(name, _field(info, name)) for name in ("cpu family", "model", "stepping")]
    return ", ".join([this_machine().cpu, *(f"{name} {value}" for name, value in parts if value)])


def end_with_parent() -> None:
    """Has the system kill this process when its parent is gone, however that ended; where the system can."""
    if hasattr(signal, "SIGKILL") and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _l3_bytes() -> int:
    sizes = [_text(path).strip() for path in _CACHE.glob("index*/size")]
    units = {"K": 10, "M": 20}
    known = [int(size[:-1]) << units[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1:] in units]
    return max(known, default=_TYPICAL_L3_BYTES)


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
