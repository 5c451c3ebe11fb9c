"""What one rank holds: its experts, and its copies of the router and of the shared expert."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import HostArray
from ..checkpoints import Stored
from ..config import MoEConfig, weight_shapes
from ..device import DeviceLayer, DeviceModule
from ..runtime import Layer, Module, module_of
from ..weights import WeightSource, resolve
from .building import artifact_for
from .placement import Placement, local_configs

AnyLayer = Layer | DeviceLayer


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """The compiled layers of one rank, with their weights; `experts` is None on a rank without experts.

    Attributes:
        router: routes as the whole layer does; its experts have no weights.
        shared: the shared expert as a layer of one expert.
        replicated: a digest of the weights of which every rank has a copy, and of the types of all weights.
    """

    router: AnyLayer
    experts: AnyLayer | None
    shared: AnyLayer | None
    replicated: dict[str, str]


def share_of(
    config: MoEConfig,
    placement: Placement,
    rank: int,
    weights: Mapping[str, Any] | str | os.PathLike[str],
    *,
    prefix: str,
    layout: str | None,
    gate_up: str | None,
    checkpoint_format: str | None,
    store: str | os.PathLike[str] | None,
    target: str,
    device: int,
    threads: int | None,
    limit_s: float,
) -> Share:
    """Loads the compiled layers of a rank, built first where needed, and binds its weights; other experts' are not read.

    Raises:
        ArtifactError, BuildError: an artifact cannot be had.
        WeightsError: a weight is missing, superfluous, or of the wrong shape or dtype.
    """
    source = resolve(config, weights, prefix, layout, gate_up, checkpoint_format)
    configs = local_configs(config, placement)
    modules = {name: module_of(artifact_for(local, target, store, limit_s), threads, device) for name, local in configs.items()}
    held = placement.held[rank]
    experts = source.of_experts(configs["experts"], held)
    return Share(
        _router(modules["router"], source),
        _experts(modules["experts"], experts, range(len(held))) if held else None,
        _shared(modules["shared"], source) if "shared" in modules else None,
        _replicated(source),
    )


def _router(module: Module | DeviceModule, source: WeightSource) -> AnyLayer:
    packer = module.packer(module.threads)
    packer.router(dataclasses.replace(source, config=module.config))
    return module.layer(packer.blob)


def _experts(module: Module | DeviceModule, source: WeightSource, experts: Sequence[int]) -> AnyLayer:
    packer = module.packer(module.threads)
    packer.experts(source, experts)
    return module.layer(packer.blob)


def _shared(module: Module | DeviceModule, source: WeightSource) -> AnyLayer:
    names = [name for name in source.arrays if name.startswith("shared")]
    if not source.config.shared_gate:
        arrays = {name.replace("shared.", "experts."): [_one(source.arrays[name])] for name in names}
        return _experts(module, WeightSource(module.config, arrays), range(1))
    zeros = {name: HostArray(np.zeros(shape, np.float32), "float32") for name, shape in weight_shapes(module.config).items()}
    of_gated = WeightSource(module.config, zeros | {name: source.arrays[name] for name in names})
    return module.layer(module.packer(module.threads).all(of_gated))


def _one(matrix: Any) -> Any:
    return matrix if isinstance(matrix, HostArray | Stored) else matrix[0]


def _replicated(source: WeightSource) -> dict[str, str]:
    found = {}
    for name, arrays in source.arrays.items():
        each: Sequence[Any] = [arrays] if isinstance(arrays, HostArray | Stored) else arrays
        dtypes = {a.dtype if isinstance(a, HostArray) else "codes" for a in each}
        found[f"the dtype of {name}"] = ", ".join(sorted(dtypes))
        if isinstance(arrays, HostArray) and not name.startswith("experts."):
            data = np.ascontiguousarray(arrays.data)
            found[f"{name} (its SHA-256)"] = hashlib.sha256(data.tobytes()).hexdigest()[:16]
    return found
