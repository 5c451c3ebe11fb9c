"""Object files: the stages of a plan in groups, and the generated host around them.

Tile kernels whose knobs are tuned apart are in objects apart, so that a plan which differs in one of them takes the others from a
folder of objects that were compiled before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

import tvm_ffi.libinfo

from . import compiler, emission
from .errors import BuildError
from .paths import package_folder
from .plan import Plan, own_sources, versions
from .schedules import llvm
from .toolchain import cxx_for, first_error

HOST_FILES = ("pool.h", "stage.h", "pack.h", "exports.map")


def compile_all(
    todo: Plan, functions: Mapping[str, Any], work: pathlib.Path, known: pathlib.Path | None = None
) -> list[pathlib.Path]:
    """Compiles everything that is linked into a library.

    Args:
        functions: the TIR functions of the plan's TE module.
        work: an empty folder, which gets the host's source, too.
        known: a folder of objects compiled before; what is missing there is added.

    Returns:
        The objects.

    Raises:
        BuildError: the C++ compiler fails.
        ScheduleError: knobs are illegal.
    """
    keep = known is not None and not todo.edited  # of an edited module, nothing else says what its functions are
    groups: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():  # all in one where none will be taken again: each object costs a tenth of a build
        groups.setdefault(llvm.object_of(name) if keep else "stages", {})[name] = function
    host = _write_host(todo, list(functions), work)
    host_known = known / f"host-{_digest(host)}.o" if keep and known else None
    driver = None if host_known and _taken(host_known, work / "host.o") else _start_host(todo, work)
    try:
        for group, members in groups.items():
            made = work / f"{group}.o"
            before = known / f"{group}-{_digest(_decides(todo, members))}.o" if keep and known else None
            if before and _taken(before, made):
                continue
            scheduled = compiler.schedule(members, todo.geometry, todo.target, todo.knobs)
            compiler.compile_object(scheduled, todo.target, made, checked=todo.edited)  # which may not fit the generated host
            _kept(made, before)
    except BaseException:
        if driver is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)  # the driver and the compiler that it started
        raise
    finally:
        output = driver.communicate()[0] if driver is not None else ""
    if driver is not None:
        if driver.returncode:
            raise BuildError(f"compiling the generated host failed: {first_error(output)}")
        _kept(work / "host.o", host_known)
    return [work / "host.o", *(work / f"{group}.o" for group in groups)]


def _write_host(todo: Plan, functions: list[str], work: pathlib.Path) -> str:
    for name in HOST_FILES:
        shutil.copy(package_folder("templates") / "llvm" / name, work / name)
    text = emission.host_source(todo.geometry, functions, todo.regimes)
    (work / "host.cc").write_text(text, encoding="utf-8")
    return f"{text}\n{todo.target.arch}\n{own_sources()}"


def _start_host(todo: Plan, work: pathlib.Path) -> subprocess.Popen[str]:
    """Compiles the generated host beside the stages."""
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    command = [*cxx_for(todo.target.arch), "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-c", "host.cc", "-o", "host.o"]
    command += includes
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def _decides(todo: Plan, members: Mapping[str, Any]) -> str:
    """Everything that decides the code of some functions; `chunk_rows` is the host's alone."""
    tiling = {name: value for name, value in vars(todo.geometry.tiling).items() if name != "chunk_rows"}
    knobs = {name: repr(llvm.knobs_of(name, todo.knobs)) for name in members}
    parts = [todo.config.to_dict(), todo.target.to_dict(), tiling, knobs, own_sources(), versions()]
    return json.dumps(parts, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _taken(known: pathlib.Path, made: pathlib.Path) -> bool:
    try:
        shutil.copy(known, made)
    except FileNotFoundError:
        return False
    return True


def _kept(made: pathlib.Path, known: pathlib.Path | None) -> None:
    """Adds an object in one step: other processes may be looking."""
    if known is not None:
        temporary = known.with_name(f".{known.name}.{os.getpid()}")
        shutil.copy(made, temporary)
        os.replace(temporary, known)
