"""From what people have to a loaded module and weights that it can bind: artifacts, configurations, torch modules and tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..arrays import empty_aligned
from ..artifact import Artifact, check_loadable, find_artifact
from ..config import MoEConfig
from ..device import DeviceLayer, DeviceModule
from ..errors import ArtifactError, InputError
from ..runtime import Layer, Module, load, module_of

Source = str | os.PathLike[str] | Artifact | MoEConfig | Module | DeviceModule


def open_module(
    source: Source,
    *,
    store: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    device: int = 0,
    target: str | None = None,
) -> Module | DeviceModule:
    """The loaded module that `source` stands for.

    Args:
        source: an artifact's folder or the artifact, a configuration, whose artifact is looked for in the store, or a module
            that is loaded already.
        store, target, device: as in `moegen.load`.
        threads: threads of a layer on CPUs; None for as many as torch uses.

    Raises:
        ArtifactError: there is none, it is damaged, or this machine cannot run it.
        InputError: `source` is something else.
    """
    if isinstance(source, Module | DeviceModule):
        return source
    count = torch.get_num_threads() if threads is None else threads
    if isinstance(source, str | os.PathLike):
        return load(source, threads=count, device=device)
    if isinstance(source, MoEConfig):
        source = find_artifact(store, target, **source.to_dict())
    if not isinstance(source, Artifact):
        raise InputError(
            "a layer is made of an artifact, its folder, a MoEConfig whose artifact is in the store, or a loaded module, "
            f"not of {type(source).__name__}"
        )
    check_loadable(source)
    return module_of(source, count, device)


def packed_state(layer: Layer | DeviceLayer) -> tuple[Any, ...]:
    """A layer as plain values for a pickle: what `from_packed_state` takes."""
    artifact = layer.module.artifact
    if isinstance(layer, Layer):
        threads, device, packed = layer.threads, 0, layer.packed
    else:
        threads, device, packed = 1, layer.device, np.empty(layer.packed_bytes, np.uint8)
        layer.module.download(layer.packed, packed)
    return str(artifact.path.resolve()), artifact.manifest["key"], threads, device, packed


def from_packed_state(path: str, key: str, threads: int, device: int, packed: npt.NDArray[np.uint8]) -> Layer | DeviceLayer:
    """The layer that `packed_state` took apart.

    Raises:
        ArtifactError: the artifact is not there, or is another one, whose weights may be laid out otherwise.
    """
    module = open_module(path, threads=threads, device=device)
    if module.artifact.manifest["key"] != key:
        raise ArtifactError(f"{path!r} is another artifact than the one that was pickled: bind the weights again")
    if isinstance(module, DeviceModule):
        return module.layer(module.upload(packed, "uint8"))
    aligned = empty_aligned(packed.shape, np.uint8)
    aligned[...] = packed
    return module.layer(aligned)


def check_stays(fn: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """That what `torch.nn.Module.to` does to tensors leaves a layer where and, unless `dtype` is None, what it is.

    Raises:
        InputError: it does not.
    """
    moved = fn(torch.empty(0, dtype=dtype or torch.float32, device=device))
    if moved.device != device:
        raise InputError(
            f"a layer compiled for {str(device)!r} cannot be moved to {str(moved.device)!r}: "
            "make one of an artifact that was built for that target"
        )
    if dtype is not None and moved.dtype != dtype:
        raise InputError(
            f"a layer compiled for {_plain(dtype)} cannot become {_plain(moved.dtype)}: make one of an artifact with that dtype"
        )


def in_host_memory(weights: Any) -> Any:
    """Weights as `Module.bind` takes them: a torch module's, and tensors of a device, copied to the host."""
    if isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        return weights
    return {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) and not value.is_cpu else value
        for name, value in weights.items()
    }


def config_of(block: torch.nn.Module) -> MoEConfig:
    """The configuration of a transformers MoE block, from the model's configuration that it or one of its parts keeps.

    Raises:
        InputError: it keeps none.
        ConfigError: the model's type is unknown, or a field asks for what moegen cannot honour.
    """
    for part in block.modules():
        fields: Any = getattr(part, "config", None)
        if hasattr(fields, "to_dict"):
            found = MoEConfig.from_hf(fields.to_dict())
            dtype = _plain(next(block.parameters()).dtype)
            return MoEConfig.from_dict(found.to_dict() | {"dtype": dtype})
    raise InputError(f"{type(block).__name__} keeps no configuration of its model: give one, from_module(block, config)")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
