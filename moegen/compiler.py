"""TVM: targets, scheduling of an emitted module and its machine code.

Every name of TVM that moves between releases is used here, in `intrinsics`, `rewriting` and `schedules/`, nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

from .errors import BuildError, ScheduleError, TargetError, without_compiler
from .geometry import Geometry
from .schedules import llvm
from .target import ARCHS, KINDS, X86_FEATURES, Target, host_arch, host_cpu_flags, triple_of, vectors_of

try:
    import tvm
    import tvm.s_tir
    from tvm import te
    from tvm.target import codegen

    from . import intrinsics, rewriting
except ModuleNotFoundError as error:
    raise without_compiler(error) from None


def processors(arch: str | None = None) -> list[str]:
    """Names of the processors that LLVM can compile for on architecture `arch`, or on this machine's."""
    return sorted(str(name) for name in codegen.llvm_get_cpu_archlist(_llvm(_checked_arch(arch))))


def resolve_target(kind: str = "llvm", mcpu: str | None = None, arch: str | None = None) -> Target:
    """The target for LLVM processor `mcpu` of architecture `arch`, or for this machine.

    Raises:
        TargetError: the kind, the architecture or the processor is unknown.
    """
    if kind not in KINDS:
        raise TargetError(f"target={kind!r} must be one of {', '.join(KINDS)}")
    arch = _checked_arch(arch)
    host = str(codegen.llvm_get_system_cpu()) if arch == host_arch() else "x86-64" if arch == "x86_64" else "generic"
    name = mcpu or host
    if not codegen.llvm_is_valid_cpu(name, str(codegen.llvm_get_system_triple()) if arch == host_arch() else triple_of(arch)):
        listing = "`moegen build --mcpu help`" if arch == host_arch() else f"`moegen build --arch {arch} --mcpu help`"
        raise TargetError(f"mcpu={name!r} is not a processor that LLVM knows for {arch}; {listing} lists them")
    known = {str(f) for f in codegen.llvm_get_cpu_features(_llvm(arch, mcpu=name))}
    implied = [f for f in X86_FEATURES if f in known] if arch == "x86_64" else []
    flags = host_cpu_flags()
    own = name == host and arch == host_arch()
    disabled = tuple(f for f in implied if X86_FEATURES[f] not in flags) if own else ()
    features = tuple(f for f in implied if f not in disabled)
    lanes, registers = vectors_of(arch, features)
    return Target(kind, name, arch, features, disabled, lanes, registers)


def _checked_arch(arch: str | None) -> str:
    known = dict.fromkeys([host_arch(), *ARCHS])
    if arch is not None and arch not in known:
        raise TargetError(f"arch={arch!r} must be one of {', '.join(known)}")
    return arch or host_arch()


def _llvm(arch: str, **options: Any) -> Any:
    """TVM's target; LLVM's own triple where it compiles for this machine's architecture."""
    triple = {} if arch == host_arch() else {"mtriple": triple_of(arch)}
    return tvm.target.Target({"kind": "llvm", **triple, **options})


def llvm_version() -> str:
    """The version of LLVM inside TVM, e.g. 22."""
    return str(codegen.llvm_version_major())


def load_module(source: str, path: pathlib.Path) -> ModuleType:
    """Writes the emitted text to `path` and executes it as a module.

    Raises:
        BuildError: the text is not valid Python or fails when executed.
    """
    path.write_text(source, encoding="utf-8")
    name = "moegen_te_source"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the edited text raises is the user's to read
        raise BuildError(f"{path.name} fails when executed: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return module


def prim_funcs(stages: Iterable[tuple[str, list[Any]]]) -> dict[str, Any]:
    """TIR functions of the emitted stages, by name."""
    return {name: te.create_prim_func(tensors).with_attr("global_symbol", name) for name, tensors in stages}


def schedule(functions: Mapping[str, Any], geometry: Geometry, target: Target, knobs: Mapping[str, Any]) -> Any:
    """The functions as one scheduled IRModule.

    Args:
        knobs: stage name -> its knobs.

    Raises:
        ScheduleError: knobs are illegal.
    """
    intrinsics.register(geometry)
    sch = tvm.s_tir.Schedule(tvm.IRModule(dict(functions)))
    wishes = {}
    for name in functions:
        stage = llvm.stage_of(name)
        if stage not in llvm.STAGES:
            raise ScheduleError(f"there is no schedule for stage {stage!r}; known: {', '.join(llvm.STAGES)}")
        module = llvm.STAGES[stage]
        module.check(geometry, target, knobs[stage])
        sch.work_on(name)
        wishes[name] = module.apply(sch, name, geometry, knobs[stage])
    return tvm.IRModule({name: rewriting.rewrite(sch.mod[name], wishes[name]) for name in functions})


def compile_object(module: Any, target: Target, path: pathlib.Path, checked: bool = False) -> None:
    """Compiles a scheduled module to the object file `path`.

    Args:
        checked: whether each function checks the shapes and types of what the host gives it, which is half of its code.

    Raises:
        OSError: the file cannot be written.
    """
    executable = _compiled(module, target, checked)
    # LLVM ends the process when its file cannot be written, so it writes to memory and the disk is ours to fail on.
    memory = os.memfd_create("stages.o")
    try:
        executable.mod.write_to_file(f"/proc/self/fd/{memory}", "o")
        with open(f"/proc/self/fd/{memory}", "rb") as written:
            path.write_bytes(written.read())
    finally:
        os.close(memory)


def assembly(te_source: str, names: Collection[str], geometry: Geometry, target: Target, knobs: Mapping[str, Any]) -> str:
    """Machine assembly of the functions `names` of an emitted module, without the lines that are for debuggers.

    Raises:
        BuildError: the module fails, or has no such function.
    """
    with tempfile.TemporaryDirectory() as folder:
        stages = dict(load_module(te_source, pathlib.Path(folder) / "te_source.py").stages())
    if missing := [name for name in names if name not in stages]:
        raise BuildError(f"there is no stage {missing[0]!r}; this layer has {_enumerated(stages)}")
    functions = prim_funcs((name, stages[name]) for name in names)
    executable = _compiled(schedule(functions, geometry, target, knobs), target)
    return _without_debugging(str(executable.mod.inspect_source("asm")))


def _enumerated(names: Iterable[str]) -> str:
    """The functions of a module in words, those of one stage together."""
    stages: dict[str, list[str]] = {}
    for name in names:
        stages.setdefault(llvm.stage_of(name), []).append(name)
    return ", ".join(same[0] if len(same) == 1 else f"{same[0]} to {same[-1]}" for same in stages.values())


def _compiled(module: Any, target: Target, checked: bool = False) -> Any:
    options: dict[str, Any] = {"mcpu": target.mcpu}
    if target.disabled:
        options["mattr"] = [f"-{feature}" for feature in target.disabled]
    with tvm.transform.PassContext(config={"tirx.disable_assert": not checked}):
        return tvm.compile(module, target=_llvm(target.arch, **options))


def _without_debugging(text: str) -> str:
    lines, wanted = [], True
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+)", line):
            wanted = not section[1].startswith(".debug")
        if wanted and not re.match(r"\s*\.(loc|cfi_\w+|file)(\s|$)|\.L(tmp|func_begin|func_end)\d+:", line):
            lines.append(line)
    return "\n".join(lines) + "\n"
