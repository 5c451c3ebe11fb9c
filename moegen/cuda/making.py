"""Filling an artifact's folder for CUDA: library, sources, machine code to look at, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from . import emission, library
from .kernels import HopperKernel, Kernel
from .nvidia import Cubin
from .planning import CudaPlan, versions

KERNELS = "kernels.cu"
PTX = "kernels.ptx"
HOPPER = "hopper.cu"  # of the kernels that Hopper has of its own, where there are any


def hopper_script(symbol: str) -> str:
    """Name of the file with the TVM script that one of these was compiled from."""
    return f"{symbol}.py"


def cubin_of(architecture: str, source: str = KERNELS) -> str:
    """Name of the file with the machine code of a source for an architecture."""
    return f"{source.removesuffix('.cu')}.{architecture}.cubin"


def sources(folder: pathlib.Path) -> list[str]:
    """The CUDA C++ of an artifact, in one or two files that are compiled each by itself: Hopper's own kernels come second."""
    return [path.read_text(encoding="utf-8") for name in (KERNELS, HOPPER) if (path := folder / name).is_file()]


def cubins(folder: pathlib.Path, architecture: str) -> list[bytes]:
    """The machine code of these for an architecture."""
    names = (cubin_of(architecture), cubin_of(architecture, HOPPER))
    return [path.read_bytes() for name in names if (path := folder / name).is_file()]


def fill(folder: pathlib.Path, todo: CudaPlan, stages: Mapping[str, Any], work: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Makes the library `out` and keeps in `folder` what it was made of.

    Args:
        stages: name -> tensors of the plan's module.
        work: an empty folder.

    Returns:
        The part of the manifest that only CUDA has, or has otherwise.

    Raises:
        BuildError: a compiler is missing or fails.
        ScheduleError: knobs are illegal.
    """
    made = library.make(stages, todo.geometry, todo.target, todo.knobs, todo.regimes, todo.few_tokens, todo.route_tokens, work, out)
    kept = [KERNELS, PTX, *(cubin_of(one.architecture.name) for one in made.compiled.cubins)]
    launches: dict[str, Kernel | HopperKernel] = {k.symbol: k for stage in made.program.stages.values() for k in stage.kernels}
    resources = {one.architecture.name: _resources(one, launches) for one in made.compiled.cubins}
    if made.hopper:
        program, cubin = made.hopper
        kept += [HOPPER, cubin_of(cubin.architecture.name, HOPPER)]
        resources[cubin.architecture.name] |= _resources(cubin, {kernel.symbol: kernel for kernel in program.kernels})
        for kernel in program.kernels:
            (folder / hopper_script(kernel.symbol)).write_text(kernel.script, encoding="utf-8")
    for name in kept:
        (work / name).rename(folder / name)
    return {
        "tiling": {"rows": sorted({regime.rows for regime in todo.regimes})},
        "regimes": [dataclasses.asdict(regime) for regime in todo.regimes],
        "few_tokens": todo.few_tokens,
        "route_tokens": todo.route_tokens,
        "knobs": {stage: dataclasses.asdict(knobs) for stage, knobs in todo.knobs.items()},
        "max_tokens": emission.INT32_MAX // todo.config.top_k,
        "functions": _functions(todo),
        "stages": list(made.program.stages),
        "versions": versions() | {"compiler": made.compiled.compiler},
        "source_sha256": hashlib.sha256(todo.te_source.encode()).hexdigest(),
        "resources": resources,
    }


def _resources(cubin: Cubin, launches: Mapping[str, Kernel | HopperKernel]) -> dict[str, Any]:
    """What each kernel of a cubin uses; one that is in no stage has no dynamic shared memory."""
    return {
        kernel: dataclasses.asdict(used)
        | {
            "spilled_bytes": cubin.spilled_bytes[kernel],
            "threads": launches[kernel].threads if kernel in launches else used.max_threads,
            "dynamic_shared_bytes": launches[kernel].shared_bytes if kernel in launches else 0,
        }
        for kernel, used in cubin.resources.items()
    }


def _functions(todo: CudaPlan) -> dict[str, list[str]]:
    """Exported functions and their arguments; tensors are on the device of `weights`."""
    c = todo.config
    x, ids, weights = f"x {c.dtype} [T, {c.hidden}]", f"ids int32 [T, {c.top_k}]", f"routing_weights float32 [T, {c.top_k}]"
    blob, workspace, unused = "weights uint8 [packed_bytes]", "workspace uint8 [>= moe_workspace_bytes(T)]", "0"
    load, stats = f"load int32 [{c.experts}]", "stats float64 [4]: dropped, load-balancing, adaptive, z loss"
    out = f"out {c.dtype} [T, {c.hidden}]"
    optional = [f"{argument} | None" for argument in (ids, weights, load, stats)]
    return {
        "moe_forward": [x, f"x_router {c.dtype} [T, {c.hidden}] | None", out, blob, workspace, unused, *optional],
        "moe_route": [x, blob, workspace, unused, ids, weights, load, stats],
        "moe_experts": [x, ids, weights, out, blob, workspace, unused],
        "moe_workspace_bytes": ["T int"],
        "moe_pack": ["blob uint8 [packed_bytes]", "segment int", "expert int", "gate or weight [n, k]", "up [n, k] | None", unused],
        "moe_empty": ["shape", "dtype", "device int"],
        "moe_view": ["tensor", "shape"],
        "moe_copy": ["to", "from", "device int"],
        "moe_clear": ["tensor", "device int"],
        "moe_prepare": ["device int"],
        "moe_device_count": [],
        "moe_time": [f"[{x}, ...]", out, f"[{blob}, ...]", workspace, "first int", "calls int"],
    }
