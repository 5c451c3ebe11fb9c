"""What a build for CUDA will do: everything that decides the artifact, in one value with one key."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .. import records, sources, te_module
from ..choices import REGIMES
from ..config import MoEConfig, config_key
from ..cuda_geometry import CudaGeometry
from ..errors import BuildError, ScheduleError, TargetError
from ..schedules.cuda import few, hopper, route, tiling
from ..target import ARCHS, Target, host_arch
from ..version import __version__
from . import choices, emission, hardware, nvidia
from .architectures import parse
from .emission import RowBlocks

DEFAULT_GPU = "sm_90"
MOST_FEW_TOKENS = 8
SOURCES = ("templates/cuda/*", "templates/te/*", "schedules/cuda/*.py")


@dataclasses.dataclass(frozen=True)
class CudaPlan:
    """Everything that decides what a build for CUDA produces; two plans with the same key give the same artifact.

    Args:
        geometry: the layer and how its weights are packed.
        target: what it is compiled for.
        te_source: the tensor-expression module.
        knobs: stage -> `tiling.Tile` of a tiled product, `few.Knobs` of one for few tokens, `route.Knobs`, and where Hopper has a
            kernel of its own, stage and `_hopper` -> `hopper.Knobs`.
        regimes: how many rows a row block has.
        few_tokens: tokens up to which every choice reads its expert's weights itself.
        route_tokens: tokens up to which the router and the choice of experts are one launch, 0 for never.
        edited: the module was edited by hand.
        records: regime -> the tuning record that its choices come from.
    """

    geometry: CudaGeometry
    target: Target
    te_source: str
    knobs: Mapping[str, Any]
    regimes: tuple[RowBlocks, ...]
    few_tokens: int
    route_tokens: int
    edited: bool = False
    records: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> MoEConfig:
        """The layer."""
        return self.geometry.config

    @property
    def key(self) -> str:
        """SHA-256 of all inputs: configuration, target, knobs, sources and versions."""
        parts = {
            "config": config_key(self.config),
            "target": self.target.to_dict(),
            "knobs": {stage: dataclasses.asdict(k) for stage, k in self.knobs.items()},
            "regimes": [dataclasses.asdict(regime) for regime in self.regimes],
            "few_tokens": self.few_tokens,
            "route_tokens": self.route_tokens,
            "te_source": self.te_source,
            "own_sources": own_sources(),
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the artifact's folder."""
        c = self.config
        sizes = f"e{c.experts}-k{c.top_k}-h{c.hidden}-i{c.intermediate}"
        return f"moe-{sizes}-{c.dtype}-{c.gating}-{c.activation}-{self.target.slug}-{self.key[:10]}".replace("_", "-")


def plan(
    config: MoEConfig,
    gpus: str | Sequence[str] | None = None,
    *,
    tf32: bool = False,
    arch: str | None = None,
    tuned: bool = True,
    logs: str | os.PathLike[str] | None = None,
) -> CudaPlan:
    """What building `config` for CUDA would do.

    Args:
        gpus: architectures such as `sm_90`, several as a list or parted by commas; None for `sm_90`.
        tf32: multiply float32 on tensor cores, rounded to 10 bits of mantissa.
        arch: architecture of the machine around the device; None for this one.
        tuned: take the choices of tuning records for these architectures that hold: where there is a device, those of such
            devices, and where there is none, as on most machines that build, those of all.
        logs: the user's records, as in `records.user_folder`.

    Raises:
        TargetError: an architecture is unknown, or the layer is one that CUDA cannot do yet.
        RecordError: records cannot be read.
    """
    target = resolve_target(gpus, tf32=tf32, arch=arch)
    made = default_plan(config, target)
    return _tuned(made, logs) if tuned else made


def default_plan(config: MoEConfig, target: Target, rows: Sequence[int] = tiling.ROWS) -> CudaPlan:
    """What building `config` would do when nothing was tuned.

    Args:
        rows: heights of the row blocks that there are to be.

    Raises:
        TargetError: the layer is one that CUDA cannot do yet.
    """
    _check(config, target)
    geometry = CudaGeometry(config)
    text = emission.te_source(geometry, target, rows)
    knobs = default_knobs(geometry, target, rows) | hopper_knobs(geometry, target, rows)
    return CudaPlan(geometry, target, text, knobs, default_regimes(rows), few_tokens(config), route.default_tokens(geometry))


def _tuned(made: CudaPlan, logs: str | os.PathLike[str] | None) -> CudaPlan:
    used = {}
    for regime, decision in records.choose(made.config, made.target.slug, REGIMES, provenance(), logs).used.items():
        with contextlib.suppress(ScheduleError):  # knobs that are none of this layer's are no reason not to build it
            made, used[regime] = choices.chosen(made, regime, decision["knobs"]), records.origin(decision)
    return dataclasses.replace(made, records=used)


def plan_from_source(
    path: str | os.PathLike[str], gpus: str | Sequence[str] | None = None, *, tf32: bool = False, arch: str | None = None
) -> CudaPlan:
    """What building an edited TE module would do; the configuration is read from the file.

    Hopper has no kernels of its own then: they are not made from that module, and would not follow the edits.

    Raises:
        BuildError: the file cannot be read or has no CONFIG and TILING.
    """
    text, config, rows = te_module.read(path, _rows)
    target = resolve_target(gpus, tf32=tf32, arch=arch)
    _check(config, target)
    geometry = CudaGeometry(config)
    knobs = default_knobs(geometry, target, rows)
    route_tokens = route.default_tokens(geometry)
    return CudaPlan(geometry, target, text, knobs, default_regimes(rows), few_tokens(config), route_tokens, edited=True)


def _rows(values: Mapping[str, Any]) -> list[int]:
    rows = values["rows"]
    if not (isinstance(rows, list) and rows and all(isinstance(r, int) and r in tiling.ROWS for r in rows)):
        raise TypeError(f"TILING['rows'] must be a list out of {', '.join(map(str, tiling.ROWS))}")
    return rows


def resolve_target(gpus: str | Sequence[str] | None = None, *, tf32: bool = False, arch: str | None = None) -> Target:
    """The target for these architectures.

    Raises:
        TargetError: an architecture is unknown.
    """
    if arch is not None and arch not in {host_arch(), *ARCHS}:
        raise TargetError(f"arch={arch!r} must be one of {', '.join(ARCHS)}")
    names = DEFAULT_GPU if gpus is None else gpus
    wanted = parse(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    found = tuple(one.name for one in wanted)
    return Target("cuda", "-".join(found), arch or host_arch(), (), (), 0, 0, found, tf32)


def _check(config: MoEConfig, target: Target) -> None:
    if config.low_bit or config.activation_dtype != "same":
        stored = config.weight_dtype if config.low_bit else f"activation_dtype={config.activation_dtype}"
        raise TargetError(f"few bits ({stored}) are for --target llvm; cuda takes weights of float32, float16 and bfloat16")
    if target.tf32 and config.dtype != "float32":
        raise TargetError(f"tf32 is for float32 layers, and this one is {config.dtype}")


def default_knobs(geometry: CudaGeometry, target: Target, rows: Sequence[int]) -> dict[str, Any]:
    """What is chosen when nothing was tuned."""
    limits = (geometry.item_bytes, min(one.max_shared_bytes_per_block for one in parse(target.gpus)))
    router = tiling.default(emission.ROUTER_ROWS, geometry.router, *limits)
    found: dict[str, Any] = {f"router_{emission.ROUTER_ROWS}": router}
    found |= {"router_few": route.default_alone(geometry), "route": route.default(geometry)}
    for name, product in geometry.products.items():
        if name == "router":
            continue
        if name != "shared_down":  # which is a part of down_few
            found[f"{name}_few"] = few.Knobs()
        found |= {f"{name}_{height}": tiling.default(height, product, *limits) for height in rows}
    return found


def hopper_knobs(geometry: CudaGeometry, target: Target, rows: Sequence[int]) -> dict[str, hopper.Knobs]:
    """Of the products that Hopper computes in its own way: those of the highest row blocks, by `up_128_hopper`."""
    if hopper.ARCHITECTURE not in target.gpus or max(rows) < hopper.FEWEST_ROWS:
        return {}
    return {
        f"{side}_{max(rows)}{hopper.SUFFIX}": hopper.default(hopper.GroupedProduct.of(geometry, side), max(rows))
        for side in hopper.sides(geometry)
    }


def default_regimes(rows: Sequence[int]) -> tuple[RowBlocks, ...]:
    """The next height of row blocks begins where the one before would be filled half again."""
    heights = sorted(rows)
    return (*(RowBlocks(height * 3 // 2, height) for height in heights[:-1]), RowBlocks(None, heights[-1]))


def few_tokens(config: MoEConfig) -> int:
    """As long as choices mostly have experts of their own; where capacity drops choices, somebody has to count them."""
    return 0 if config.capacity_factor is not None else max(1, min(MOST_FEW_TOKENS, config.experts // config.top_k))


def own_sources() -> str:
    """SHA-256 of templates and schedules, which decide the code as much as the choices do; comments in schedules do not count."""
    return sources.digest(SOURCES)


def provenance() -> records.Provenance:
    """What times of CUDA devices that are measured here and now depend on; without a device, what builds here depend on."""
    compiler = f"apache-tvm {versions()['apache-tvm']}, {nvidia_compiler()}"
    return records.Provenance(own_sources(), compiler, hardware.name())


@functools.cache
def nvidia_compiler() -> str:
    """NVIDIA's compiler with its version: a process asks it once."""
    try:
        return str(nvidia.find())
    except BuildError:  # planning needs none, and what needs one says so itself
        return "none of NVIDIA's compilers"


def versions() -> dict[str, str]:
    """Versions of what decides the machine code, but for NVIDIA's compiler, which the manifest names."""
    return {"moegen": __version__, **{name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")}}
