"""TVM: targets, scheduling of an emitted module and its machine code.

Every name of TVM that moves between releases is used here, in `intrinsics`, `rewriting` and `schedules/`, nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from .errors import BuildError, ScheduleError, TargetError, without_compiler
from .geometry import Geometry
from .schedules import llvm
from .target import KINDS, X86_FEATURES, Target, host_arch, host_cpu_flags, vectors_of

try:
    import tvm
    import tvm.s_tir
    from tvm import te
    from tvm.target import codegen

    from . import intrinsics, rewriting
except ModuleNotFoundError as error:
    raise without_compiler(error) from None


def processors() -> list[str]:
    """Names of the processors that LLVM can compile for on this architecture."""
    return sorted(str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"})))


def resolve_target(kind: str = "llvm", mcpu: str | None = None) -> Target:
    """The target for LLVM processor `mcpu`, or for this machine.

    Raises:
        TargetError: the kind or the processor is unknown.
    """
    if kind not in KINDS:
        raise TargetError(f"target={kind!r} must be one of {', '.join(KINDS)}")
    host, arch = str(codegen.llvm_get_system_cpu()), host_arch()
    name = mcpu or host
    if not codegen.llvm_is_valid_cpu(name, str(codegen.llvm_get_system_triple())):
        raise TargetError(f"mcpu={name!r} is not a processor that LLVM knows for {arch}; `moegen build --mcpu help` lists them")
    known = {str(f) for f in codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": name}))}
    implied = [f for f in X86_FEATURES if f in known] if arch == "x86_64" else []
    flags = host_cpu_flags()
    disabled = tuple(f for f in implied if X86_FEATURES[f] not in flags) if name == host else ()
    features = tuple(f for f in implied if f not in disabled)
    lanes, registers = vectors_of(arch, features)
    return Target(kind, name, arch, features, disabled, lanes, registers)


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
        knobs: stage name -> its knobs, as `default_knobs` gives them.

    Raises:
        ScheduleError: knobs are illegal.
    """
    intrinsics.register()
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


def default_knobs(geometry: Geometry, target: Target, functions: Iterable[str]) -> dict[str, Any]:
    """The knobs of every stage when nothing was tuned."""
    return {stage: llvm.STAGES[stage].default(geometry, target) for stage in dict.fromkeys(map(llvm.stage_of, functions))}


def compile_object(module: Any, target: Target, path: pathlib.Path) -> None:
    """Compiles a scheduled module to the object file `path`.

    Raises:
        OSError: the file cannot be written.
    """
    options: dict[str, Any] = {"kind": "llvm", "mcpu": target.mcpu}
    if target.disabled:
        options["mattr"] = [f"-{feature}" for feature in target.disabled]
    executable = tvm.compile(module, target=tvm.target.Target(options))
    # LLVM ends the process when its file cannot be written, so it writes to memory and the disk is ours to fail on.
    memory = os.memfd_create("stages.o")
    try:
        executable.mod.write_to_file(f"/proc/self/fd/{memory}", "o")
        with open(f"/proc/self/fd/{memory}", "rb") as written:
            path.write_bytes(written.read())
    finally:
        os.close(memory)
