"""Building: a configuration in, a compiled, verified artifact out.

configuration -> geometry -> emitted TE -> scheduled TIR -> object ┐
                          -> generated C++ host ───────────────────┴-> one library -> proof -> published folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import tvm_ffi.libinfo

from . import artifact as artifacts
from . import compiler, emission, objects, verification
from .artifact import Artifact
from .config import MoEConfig
from .cuda import making, planning, proof
from .cuda.planning import CudaPlan
from .errors import ArtifactError, BuildError, MoegenError, TargetError, VerificationError
from .packing import layout_key
from .plan import Plan, plan, plan_from_source, versions
from .schedules import llvm
from .target import host_arch
from .toolchain import cxx_for, first_error

INT32_MAX = 2**31 - 1


def build(
    config: MoEConfig | Plan | CudaPlan,
    target: str = "llvm",
    out: str | os.PathLike[str] | None = None,
    *,
    mcpu: str | None = None,
    arch: str | None = None,
    verify: bool = True,
    force: bool = False,
    tuning: bool = True,
    known_objects: str | os.PathLike[str] | None = None,
    tf32: bool = False,
) -> Artifact:
    """Builds one layer, or finds it already built for the same inputs.

    Args:
        config: the layer, or a `Plan`.
        target: `llvm` (CPUs) or `cuda` (NVIDIA devices; none is needed for building).
        out: the store folder; None for the user's.
        mcpu: processor name as LLVM knows it; None for this machine's.
        arch: for `llvm`, `x86_64` or `aarch64`; None for this machine's. Another one needs a C++ compiler for it ($CXX).
            For `cuda`, the devices' architecture such as `sm_90`, several parted by commas; None for `sm_90`.
        verify: prove the module against the float64 reference; skipped (and recorded as skipped) for other processors' code.
        force: build even when it is there.
        tuning: use tuning records that hold on this machine (see `moegen.records`); a `Plan` has its choices already.
        known_objects: a folder of object files of earlier builds, to take from and to add to (see `moegen.objects`).
        tf32: for float32 layers on `cuda`: multiply on tensor cores, rounded to 10 bits of mantissa.

    Returns:
        The artifact; its `.path` is what `moegen.load` takes.

    Raises:
        BuildError, TargetError, ScheduleError, VerificationError: nothing was left behind.
        ArtifactError: the store cannot be written.
    """
    todo = config if isinstance(config, Plan | CudaPlan) else plan_for(config, target, mcpu, arch, tuning=tuning, tf32=tf32)
    store = pathlib.Path(out) if out is not None else artifacts.default_store()
    final = store / todo.name
    if not force and (existing := _already_built(final, todo)) is not None:
        return existing
    with artifacts.unpublished(store) as folder:
        try:
            with _blaming_edits(todo):
                _fill(folder, todo, verify, None if known_objects is None else pathlib.Path(known_objects))
            artifacts.publish(folder, final, keep=lambda: not force and _already_built(final, todo) is not None)
        except OSError as error:
            raise BuildError(f"cannot write the artifact to {str(store)!r}: {error.strerror or error}") from error
    return artifacts.open_artifact(final)


def plan_for(
    config: MoEConfig,
    target: str = "llvm",
    mcpu: str | None = None,
    arch: str | None = None,
    *,
    tuning: bool = True,
    tf32: bool = False,
) -> Plan | CudaPlan:
    """What building `config` with these arguments of `build` would do.

    Raises:
        TargetError: the target is unknown, or an argument is for another one.
    """
    _check_arguments(target, mcpu, tf32)
    if target == "cuda":
        return planning.plan(config, arch, tf32=tf32, tuned=tuning)
    return plan(config, target, mcpu, arch=arch, tuned=tuning)


def plan_from_source_for(
    path: str | os.PathLike[str], target: str = "llvm", mcpu: str | None = None, arch: str | None = None, *, tf32: bool = False
) -> Plan | CudaPlan:
    """What building an edited TE module would do.

    Raises:
        BuildError: the file cannot be read, or is not for this target.
        TargetError: the target is unknown, or an argument is for another one.
    """
    _check_arguments(target, mcpu, tf32)
    if target == "cuda":
        return planning.plan_from_source(path, arch, tf32=tf32)
    return plan_from_source(path, target, mcpu, arch)


def _check_arguments(target: str, mcpu: str | None, tf32: bool) -> None:
    if target == "cuda" and mcpu is not None:
        raise TargetError(f"mcpu={mcpu!r} is for target llvm: of cuda, say the devices' architecture (arch)")
    if target != "cuda" and tf32:
        raise TargetError(f"tf32 is for target cuda, not {target!r}")


def _already_built(final: pathlib.Path, todo: Plan | CudaPlan) -> Artifact | None:
    try:
        existing = artifacts.open_artifact(final)
        artifacts.check_files(existing)
    except ArtifactError:
        return None
    return existing if existing.manifest["key"] == todo.key else None


def _fill(folder: pathlib.Path, todo: Plan | CudaPlan, verify: bool, known: pathlib.Path | None) -> None:
    """Everything between an empty folder and a sealed artifact."""
    work = folder / "work"
    work.mkdir()
    module = compiler.load_module(todo.te_source, folder / artifacts.TE_SOURCE)
    if isinstance(todo, CudaPlan):
        own = making.fill(folder, todo, _stages(module), work, folder / artifacts.LIBRARY)
    else:
        functions = _prim_funcs(module)
        made = objects.compile_all(todo, functions, work, known)
        _link(work, made, folder / artifacts.LIBRARY, todo.target.arch)
        own = _own_part(todo, list(functions))
    shutil.rmtree(work)
    manifest = _manifest(todo) | own
    artifacts.seal(folder, manifest)
    report = _prove(folder, verify)
    (folder / artifacts.VERIFICATION).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / artifacts.MANIFEST).unlink()
    artifacts.seal(folder, manifest | {"verified": report["status"]})


@contextlib.contextmanager
def _blaming_edits(todo: Plan | CudaPlan) -> Iterator[None]:
    """Whatever goes wrong with an edited TE module is its author's to read, not a defect of moegen."""
    try:
        yield
    except (MoegenError, OSError):
        raise
    except Exception as error:
        if not todo.edited:
            raise
        reason = f"{type(error).__name__}: {first_error(str(error))}"
        raise BuildError(
            f"the edited TE module cannot be built, it does not fit its CONFIG, TILING or schedules: {reason}"
        ) from error


def _prim_funcs(module: Any) -> dict[str, Any]:
    with _blaming_stages():
        return compiler.prim_funcs(module.stages())


def _stages(module: Any) -> dict[str, Any]:
    with _blaming_stages():
        return dict(module.stages())


@contextlib.contextmanager
def _blaming_stages() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the module is the user's text
        raise BuildError(f"the TE module's stages() fails: {type(error).__name__}: {first_error(str(error))}") from error


def _link(work: pathlib.Path, made: list[pathlib.Path], library: pathlib.Path, arch: str) -> None:
    command = [*cxx_for(arch), "-shared", *(path.name for path in made), "-o", str(library.resolve())]
    command += ["-Wl,--version-script=exports.map", "-Wl,-s"]
    if arch == host_arch():
        command += ["-Wl,--no-undefined", f"-L{pathlib.Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}"]
    else:  # tvm-ffi's own library for the other architecture is not here: one of its name and without symbols
        empty = ["-shared", "-nostdlib", "-Wl,-soname,libtvm_ffi.so", "-x", "c++", "/dev/null", "-o", "libtvm_ffi.so"]
        _run([*cxx_for(arch), *empty], work)
        command += ["-Wl,--no-as-needed", "-L."]
    _run([*command, "-ltvm_ffi", "-static-libstdc++", "-static-libgcc", "-lpthread", "-lm"], work)


def _run(command: list[str], work: pathlib.Path) -> None:
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"linking the library failed: {first_error(done.stdout)}")


def _prove(folder: pathlib.Path, verify: bool) -> dict[str, Any]:
    unproven = artifacts.open_artifact(folder)
    if not verify:
        return {"status": "skipped", "reason": "verification was switched off"}
    try:
        artifacts.check_loadable(unproven)
    except ArtifactError as error:
        return {"status": "skipped", "reason": f"this machine cannot run the module: {error}"}
    report = proof.prove(unproven) if unproven.target.kind == "cuda" else verification.verify(unproven)
    if report["status"] == "skipped":
        return report
    if report["status"] != "passed":
        raise VerificationError(f"the compiled module is wrong and was thrown away: {report['failures'][0]}")
    return report


def _manifest(todo: Plan | CudaPlan) -> dict[str, Any]:
    """What every target has."""
    known = {
        "schema_version": artifacts.SCHEMA_VERSION,
        "key": todo.key,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": todo.config.to_dict(),
        "target": todo.target.to_dict(),
        "records": dict(todo.records),
        "segments": todo.geometry.describe(),
        "packed_bytes": todo.geometry.packed_bytes,
        "max_tokens": INT32_MAX // todo.config.top_k,
        "source_sha256": hashlib.sha256(todo.te_source.encode()).hexdigest(),
        "verified": "pending",
    }
    return known | {"layout": layout_key(known)}


def _own_part(todo: Plan, functions: list[str]) -> dict[str, Any]:
    """What only modules for CPUs have, or have otherwise."""
    return {
        "tiling": dataclasses.asdict(todo.geometry.tiling),
        "regimes": [dataclasses.asdict(regime) for regime in todo.regimes],
        "knobs": {stage: dataclasses.asdict(todo.knobs[stage]) for stage in dict.fromkeys(map(llvm.stage_of, functions))},
        "functions": _functions(todo.config),
        "stages": functions,
        "parts": list(emission.PARTS),
        "versions": versions(),
    }


def _functions(c: MoEConfig) -> dict[str, list[str]]:
    """Exported functions and their arguments."""
    x, ids, weights = f"x {c.dtype} [T, {c.hidden}]", f"ids int32 [T, {c.top_k}]", f"routing_weights float32 [T, {c.top_k}]"
    blob, workspace, pool = "weights uint8 [packed_bytes]", "workspace uint8 [>= moe_workspace_bytes(T)]", "pool int"
    load, stats = f"load int32 [{c.experts}]", "stats float64 [4]: dropped, load-balancing, adaptive, z loss"
    out = f"out {c.dtype} [T, {c.hidden}]"
    optional = [f"{argument} | None" for argument in (ids, weights, load, stats)]
    return {
        "moe_forward": [x, f"x_router {c.dtype} [T, {c.hidden}] | None", out, blob, workspace, pool, *optional],
        "moe_profile": [x, out, blob, workspace, pool, f"seconds float64 [{len(emission.PARTS)}]"],
        "moe_route": [x, blob, workspace, pool, ids, weights, load, stats],
        "moe_experts": [x, ids, weights, out, blob, workspace, pool],
        "moe_workspace_bytes": ["T int"],
        "moe_pack": ["blob uint8 [packed_bytes]", "segment int", "expert int", "gate or weight [n, k]", "up [n, k] | None", pool],
        "moe_pool": ["threads int"],
        "moe_pool_free": [pool],
    }
