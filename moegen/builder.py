"""Building: a configuration in, a compiled, verified artifact out.

configuration -> geometry -> emitted TE -> scheduled TIR -> object ┐
                          -> generated C++ host ───────────────────┴-> one library -> proof -> published folder
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import tvm_ffi.libinfo

from . import artifact as artifacts
from . import verification
from .artifact import Artifact
from .config import MoEConfig, config_key
from .errors import ArtifactError, BuildError, MoegenError, VerificationError
from .geometry import Geometry, Tiling
from .paths import package_folder
from .target import Target
from .version import __version__

try:
    from . import compiler, emission
    from .schedules import llvm
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("tvm", "jinja2"):
        raise
    raise BuildError(f"building needs the compiler ({error.name} is not installed): pip install 'moegen[build]'") from None

HOST_FILES = ("pool.h", "stage.h", "pack.h", "exports.map")
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides what a build produces; two plans with the same key give the same artifact."""

    geometry: Geometry
    target: Target
    te_source: str
    knobs: dict[str, Any]
    edited: bool = False

    @property
    def config(self) -> MoEConfig:
        """The layer."""
        return self.geometry.config

    @property
    def key(self) -> str:
        """SHA-256 of all inputs: configuration, target, tiling, knobs, sources and versions."""
        parts = {
            "config": config_key(self.config),
            "target": self.target.to_dict(),
            "tiling": dataclasses.asdict(self.geometry.tiling),
            "knobs": {stage: dataclasses.asdict(k) for stage, k in self.knobs.items()},
            "te_source": self.te_source,
            "own_sources": _own_sources(),
            "versions": {name: version for name, version in _versions().items() if name != "python"},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the artifact's folder."""
        c = self.config
        sizes = f"e{c.experts}-k{c.top_k}-h{c.hidden}-i{c.intermediate}"
        return f"moe-{sizes}-{c.dtype}-{c.gating}-{c.activation}-{self.target.mcpu}-{self.key[:10]}".replace("_", "-")


def plan(config: MoEConfig, target: str = "llvm", mcpu: str | None = None, tiling: Tiling | None = None) -> Plan:
    """What building `config` would do.

    Raises:
        TargetError: the target or the processor is unknown.
        ScheduleError: the tiling is illegal.
    """
    resolved = compiler.resolve_target(target, mcpu)
    geometry = Geometry(config, tiling or llvm.tiling.default(config, resolved))
    return _plan(geometry, resolved, emission.te_source(geometry, resolved))


def plan_from_source(path: str | os.PathLike[str], target: str = "llvm", mcpu: str | None = None) -> Plan:
    """What building an edited TE module would do; configuration and tiling are read from the file.

    Raises:
        BuildError: the file cannot be read or has no CONFIG and TILING.
    """
    file = pathlib.Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("CONFIG", "TILING")
        }
        config, tiling = MoEConfig.from_dict(values["CONFIG"]), Tiling(**values["TILING"])
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{str(file)!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    except (SyntaxError, ValueError) as error:
        raise BuildError(f"{file.name} is not a valid TE module: {error}") from error
    except (KeyError, TypeError) as error:
        raise BuildError(f"{file.name} is not an emitted TE module: CONFIG or TILING is missing or incomplete ({error})") from error
    return _plan(Geometry(config, tiling), compiler.resolve_target(target, mcpu), text, edited=True)


def _plan(geometry: Geometry, target: Target, te_source: str, edited: bool = False) -> Plan:
    llvm.tiling.check(geometry.config, target, geometry.tiling)
    return Plan(geometry, target, te_source, compiler.default_knobs(geometry, target, llvm.STAGES), edited)


def build(
    config: MoEConfig | Plan,
    target: str = "llvm",
    out: str | os.PathLike[str] | None = None,
    *,
    mcpu: str | None = None,
    verify: bool = True,
    force: bool = False,
) -> Artifact:
    """Builds one layer, or finds it already built for the same inputs.

    Args:
        config: the layer, or a `Plan`.
        target: `llvm`.
        out: the store folder; None for the user's.
        mcpu: processor name as LLVM knows it; None for this machine's.
        verify: prove the module against the float64 reference; skipped (and recorded as skipped) for other processors' code.
        force: build even when it is there.

    Returns:
        The artifact; its `.path` is what `moegen.load` takes.

    Raises:
        BuildError, TargetError, ScheduleError, VerificationError: nothing was left behind.
        ArtifactError: the store cannot be written.
    """
    todo = config if isinstance(config, Plan) else plan(config, target, mcpu)
    store = pathlib.Path(out) if out is not None else artifacts.default_store()
    final = store / todo.name
    if not force and (existing := _already_built(final, todo)) is not None:
        return existing
    with artifacts.unpublished(store) as folder:
        try:
            with _blaming_edits(todo):
                _fill(folder, todo, verify)
            artifacts.publish(folder, final)
        except OSError as error:
            raise BuildError(f"cannot write the artifact to {str(store)!r}: {error.strerror or error}") from error
    return artifacts.open_artifact(final)


def _already_built(final: pathlib.Path, todo: Plan) -> Artifact | None:
    try:
        existing = artifacts.open_artifact(final)
        artifacts.check_files(existing)
    except ArtifactError:
        return None
    return existing if existing.manifest["key"] == todo.key else None


def _fill(folder: pathlib.Path, todo: Plan, verify: bool) -> None:
    """Everything between an empty folder and a sealed artifact."""
    work = folder / "work"
    work.mkdir()
    module = compiler.load_module(todo.te_source, folder / artifacts.TE_SOURCE)
    functions = _prim_funcs(module)
    host = _start_host(todo, list(functions), work)
    try:
        compiler.compile_object(
            compiler.schedule(functions, todo.geometry, todo.target, todo.knobs), todo.target, work / "stages.o"
        )
    except BaseException:
        os.killpg(host.pid, signal.SIGKILL)  # the driver and the compiler that it started
        raise
    finally:
        output = host.communicate()[0]
    if host.returncode:
        raise BuildError(f"compiling the generated host failed: {_last_line(output)}")
    _link(work, folder / artifacts.LIBRARY)
    shutil.rmtree(work)
    manifest = _manifest(todo, list(functions))
    artifacts.seal(folder, manifest)
    report = _prove(folder, verify)
    (folder / artifacts.VERIFICATION).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / artifacts.MANIFEST).unlink()
    artifacts.seal(folder, manifest | {"verified": report["status"]})


@contextlib.contextmanager
def _blaming_edits(todo: Plan) -> Iterator[None]:
    """Whatever goes wrong with an edited TE module is its author's to read, not a defect of moegen."""
    try:
        yield
    except (MoegenError, OSError):
        raise
    except Exception as error:
        if not todo.edited:
            raise
        reason = f"{type(error).__name__}: {_last_line(str(error))}"
        raise BuildError(
            f"the edited TE module cannot be built, it does not fit its CONFIG, TILING or schedules: {reason}"
        ) from error


def _prim_funcs(module: Any) -> dict[str, Any]:
    try:
        return compiler.prim_funcs(module.stages())
    except Exception as error:  # the module is the user's text
        raise BuildError(f"the TE module's stages() fails: {type(error).__name__}: {_last_line(str(error))}") from error


def _start_host(todo: Plan, functions: list[str], work: pathlib.Path) -> subprocess.Popen[str]:
    """Compiles the generated host beside the stages."""
    for name in HOST_FILES:
        shutil.copy(package_folder("templates") / "llvm" / name, work / name)
    (work / "host.cc").write_text(emission.host_source(todo.geometry, functions), encoding="utf-8")
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    command = [*_cxx(), "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-c", "host.cc", "-o", "host.o", *includes]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def _link(work: pathlib.Path, library: pathlib.Path) -> None:
    ffi = pathlib.Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    command = [*_cxx(), "-shared", "host.o", "stages.o", "-o", str(library.resolve()), "-Wl,--version-script=exports.map", "-Wl,-s"]
    command += ["-Wl,--no-undefined", f"-L{ffi}", "-ltvm_ffi", "-static-libstdc++", "-static-libgcc", "-lpthread", "-lm"]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"linking the library failed: {_last_line(done.stdout)}")


def _cxx() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name.split()[0])):
            return [path, *name.split()[1:]]
    raise BuildError("building needs a C++ compiler for the generated host: install g++ or clang++ (or set CXX)")


def _prove(folder: pathlib.Path, verify: bool) -> dict[str, Any]:
    unproven = artifacts.open_artifact(folder)
    if not verify:
        return {"status": "skipped", "reason": "verification was switched off"}
    try:
        artifacts.check_loadable(unproven)
    except ArtifactError as error:
        return {"status": "skipped", "reason": f"this machine cannot run the module: {error}"}
    report = verification.verify(unproven)
    if report["status"] != "passed":
        raise VerificationError(f"the compiled module is wrong and was thrown away: {report['failures'][0]}")
    return report


def _manifest(todo: Plan, functions: list[str]) -> dict[str, Any]:
    g, c = todo.geometry, todo.config
    return {
        "schema_version": artifacts.SCHEMA_VERSION,
        "key": todo.key,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": c.to_dict(),
        "target": todo.target.to_dict(),
        "tiling": dataclasses.asdict(g.tiling),
        "knobs": {stage: dataclasses.asdict(todo.knobs[stage]) for stage in dict.fromkeys(map(llvm.stage_of, functions))},
        "segments": g.describe(),
        "packed_bytes": g.packed_bytes,
        "max_tokens": INT32_MAX // c.top_k,
        "functions": _functions(c),
        "stages": functions,
        "source_sha256": hashlib.sha256(todo.te_source.encode()).hexdigest(),
        "versions": _versions(),
        "verified": "pending",
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
        "moe_route": [x, blob, workspace, pool, ids, weights, load, stats],
        "moe_experts": [x, ids, weights, out, blob, workspace, pool],
        "moe_workspace_bytes": ["T int"],
        "moe_pack": ["blob uint8 [packed_bytes]", "segment int", "expert int", "gate or weight [n, k]", "up [n, k] | None", pool],
        "moe_pool": ["threads int"],
        "moe_pool_free": [pool],
    }


def _versions() -> dict[str, str]:
    return {
        "moegen": __version__,
        "apache-tvm": importlib.metadata.version("apache-tvm"),
        "apache-tvm-ffi": importlib.metadata.version("apache-tvm-ffi"),
        "python": platform.python_version(),
    }


def _own_sources() -> str:
    """SHA-256 of the host templates and schedules, which decide the code as much as the TE text does."""
    digest = hashlib.sha256()
    for folder in ("templates/llvm", "schedules"):
        top, _, rest = folder.partition("/")
        for path in sorted((package_folder(top) / rest).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    return (errors or text.strip().splitlines() or ["no output"])[0].strip()


# ---------------------------------------------------------------- many at once


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one of several builds ended: with an artifact (built now or found) or with the reason why not."""

    config: MoEConfig
    artifact: Artifact | None
    error: MoegenError | None
    seconds: float


def build_many(
    configs: Sequence[MoEConfig | Plan],
    target: str = "llvm",
    out: str | os.PathLike[str] | None = None,
    *,
    mcpu: str | None = None,
    verify: bool = True,
    force: bool = False,
    jobs: int | None = None,
) -> Generator[Outcome, None, None]:
    """Builds several layers in parallel processes; yields each outcome as it comes.

    Args:
        jobs: processes at a time; None for one per processor, at most one per configuration.
    """
    workers = min(jobs or os.cpu_count() or 1, len(configs))
    options = {"target": target, "out": out, "mcpu": mcpu, "verify": verify, "force": force}
    if workers <= 1:
        for config in configs:
            yield _attempt(config, options)
        return
    context = multiprocessing.get_context("spawn")
    # Each worker leads a process group: the terminal's Ctrl-C is the parent's to handle, and killing one takes its compiler too.
    executor = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=os.setpgrp)
    try:
        futures = {executor.submit(_attempt, config, options): config for config in configs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future.result()
            except concurrent.futures.BrokenExecutor:
                layer = futures[future]
                killed = BuildError("a build process was killed, perhaps for want of memory: try fewer at a time (jobs)")
                yield Outcome(layer.config if isinstance(layer, Plan) else layer, None, killed, 0.0)
    except BaseException:
        for process in list((getattr(executor, "_processes", None) or {}).values()):
            process.terminate()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        artifacts.clear_leftovers(pathlib.Path(out) if out is not None else artifacts.default_store())


def _attempt(config: MoEConfig | Plan, options: dict[str, Any]) -> Outcome:
    start = datetime.datetime.now()
    layer = config.config if isinstance(config, Plan) else config
    try:
        made, error = build(config, **options), None
    except MoegenError as caught:
        made, error = None, caught
    return Outcome(layer, made, error, (datetime.datetime.now() - start).total_seconds())
