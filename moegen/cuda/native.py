"""Translated kernels and the emulator's runtime, compiled by the machine's C++ compiler into one library."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
from dataclasses import dataclass

from ..errors import EmulationError
from ..machine import processor
from ..paths import package_folder
from ..toolchain import cxx
from .translation import translate

# Parts of the runtime, and how much compiling each deserves.
_RUNTIME = {
    "launch": "-O1",
    "faults": "-O1",
    "scheduler": "-O2",
    "copies": "-O2",
    "bulk": "-O1",
    "matrix": "-O3",
    "wgmma": "-O3",
}
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native", "-pthread", "-w")
# The running fiber is looked up at every turn, which has to be one load.
_FIBERS = (*_COMMON, "-ftls-model=initial-exec")
# Products and sums stay apart unless the source says fma; buffers of bytes are read as any type, as TVM's code does.
_KERNELS = (*_FIBERS, "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-exceptions")
_SAID_CHARACTERS = 4000
_WHY = "emulating CUDA needs a C++ compiler"


@dataclass(frozen=True)
class _Unit:
    """A C++ file, and the object that it becomes."""

    source: pathlib.Path
    flags: tuple[str, ...]
    object: pathlib.Path


def library(source: str, folder: pathlib.Path, arch: str) -> pathlib.Path:
    """Makes the library of a CUDA source's kernels, unless it is there already.

    Args:
        source: CUDA C.
        folder: where it is put.
        arch: what `__CUDA_ARCH__` says, for example `sm_90a`.

    Raises:
        EmulationError: the source uses what is not emulated, or does not compile.
        BuildError: there is no C++ compiler.
    """
    command = cxx(_WHY)
    here, common = _templates(command)
    folder.mkdir(parents=True, exist_ok=True)
    shared = _cache(folder)
    units = [
        _Unit(here / f"{name}.cc", (*_FIBERS, level), shared / f"{name}-{_digest(common, *_FIBERS, level)}.o")
        for name, level in _RUNTIME.items()
    ]
    text = f'#include "emulator.h"\n{translate(source, command, arch).text}'
    stem = f"kernels-{_digest(common, text, *_KERNELS)}"
    made = folder / f"{stem}.so"
    if not made.is_file():
        kernels = folder / f"{stem}.cc"
        _unfinished(kernels).write_text(text, encoding="utf-8")
        os.replace(_unfinished(kernels), kernels)
        units.append(_Unit(kernels, _KERNELS, folder / f"{stem}.o"))
        _compile(command, here, units)
        _link([*command, "-shared", "-pthread", *(str(unit.object) for unit in units)], made)
    return made


def driver(folder: pathlib.Path) -> pathlib.Path:
    """Makes the emulated driver, `libcuda.so.1`, unless it is there already; returns the folder that has it.

    Args:
        folder: where it is put if the user has no cache folder.

    Raises:
        BuildError: there is no C++ compiler.
    """
    command = cxx(_WHY)
    here, common = _templates(command)
    made = _cache(folder) / f"driver-{_digest(common)}" / "libcuda.so.1"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        _link([*command, *_COMMON, "-O1", "-shared", "-Wl,-soname,libcuda.so.1", str(here / "driver.cc"), "-ldl"], made)
    return made.parent


def _cache(otherwise: pathlib.Path) -> pathlib.Path:
    """The user's folder for what does not depend on any kernel, a megabyte that takes ten seconds to make."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moegen-emulator"
    folder = base / _digest(processor())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return otherwise
    return folder if os.access(folder, os.W_OK | os.X_OK) else otherwise


def _templates(command: list[str]) -> tuple[pathlib.Path, str]:
    """The folder of the emulator's sources, and everything that what is made of them depends on."""
    here = package_folder("templates") / "cuda" / "emulator"
    return here, "\0".join([*command, *(path.read_text(encoding="utf-8") for path in sorted(here.glob("*.[ch]*")))])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], headers: pathlib.Path, units: list[_Unit]) -> None:
    """Makes the objects that are not there, at the same time."""
    started = [
        (unit, _start([*command, *unit.flags, f"-I{headers}", "-c", str(unit.source)], unit.object))
        for unit in units
        if not unit.object.is_file()
    ]
    said = [_finish(process, unit.object) for unit, process in started]
    if any(said):
        raise EmulationError(f"the emulated kernels do not compile as C++: {''.join(said)[:_SAID_CHARACTERS]}")


def _link(command: list[str], out: pathlib.Path) -> None:
    if said := _finish(_start(command, out), out):
        raise EmulationError(f"{out.name} cannot be made: {said[:_SAID_CHARACTERS]}")


def _start(command: list[str], out: pathlib.Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, "-o", str(_unfinished(out))], stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str], out: pathlib.Path) -> str:
    """Waits; a file that others may be making too appears whole. Returns what the compiler has said if it has failed."""
    said = process.communicate()[1]
    if process.returncode != 0:
        return said or f"the compiler ended with status {process.returncode}"
    os.replace(_unfinished(out), out)
    return ""


def _unfinished(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f"{out.name}.{os.getpid()}")
