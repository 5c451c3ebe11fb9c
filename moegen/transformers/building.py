"""Artifacts for experts: found in the user's store, or built there in a process of its own, and loaded."""

from __future__ import annotations

import functools
import logging
import pathlib
import threading

from .. import first_use
from ..artifact import Artifact, default_store
from ..config import MoEConfig
from ..device import DeviceModule
from ..errors import ArtifactError
from ..runtime import Module, module_of

_logger = logging.getLogger(__package__)
# What the routed experts alone depend on; the rest is the router's and the shared expert's, which a model of transformers keeps.
_EXPERTS_FIELDS = (
    "experts", "top_k", "hidden", "intermediate", "dtype", "activation", "expert_bias", "weight_on_input", "capacity_factor",
    "weight_dtype", "weight_group", "weight_zero_point", "scale_dtype", "activation_dtype",
)  # fmt: skip
_OF_LOW_BIT = ("weight_group", "weight_zero_point", "scale_dtype")
_OF_CLAMPED = ("swiglu_alpha", "swiglu_limit")

_known: dict[tuple[pathlib.Path, MoEConfig, str], Module | DeviceModule] = {}  # (store, layer, device)
_loaded: dict[tuple[pathlib.Path, str], Module | DeviceModule] = {}  # (artifact, device): layers share its threads
_lock = threading.Lock()


def module_for(config: MoEConfig, device: str) -> Module | DeviceModule:
    """The loaded artifact that computes the routed experts of `config`, one for all layers that want it.

    Args:
        config: the layer; an artifact that differs in its router or its shared expert only does as well.
        device: "cpu", or "cuda:0" and so on.

    Raises:
        ArtifactError: there is none for this CUDA device.
        BuildError: there was none for this processor, and building it failed.
    """
    with _lock:
        key = (default_store(), config, device)
        if key not in _known:
            _known[key] = _load(config, device)
        return _known[key]


def _load(config: MoEConfig, device: str) -> Module | DeviceModule:
    kind, _, index = device.partition(":")
    target = "cuda" if kind == "cuda" else "llvm"
    artifact = find(config, target)
    if artifact is None and target == "cuda":
        raise ArtifactError(
            f"the experts are on {device!r}, and {str(default_store())!r} has no artifact for {config} and target cuda: build it "
            "first, with `moegen build --model config.json --target cuda` or "
            f"`moegen build {' '.join(first_use.options_of(config))} --target cuda`"
        )
    artifact = artifact or _built(config)
    key = (artifact.path.resolve(), device)
    if key not in _loaded:
        _loaded[key] = module_of(artifact, None, int(index or 0))
    return _loaded[key]


def find(config: MoEConfig, target: str) -> Artifact | None:
    """The store's artifact for the routed experts of `config` that this machine can load, or None."""
    return first_use.find(default_store(), config, target, functools.partial(_same_experts, config))


def _same_experts(wanted: MoEConfig, other: MoEConfig) -> bool:
    names = {*_EXPERTS_FIELDS, *_OF_CLAMPED}
    if wanted.activation != "swiglu_clamped":
        names -= set(_OF_CLAMPED)
    if not wanted.low_bit:
        names -= set(_OF_LOW_BIT)
    return all(getattr(wanted, name) == getattr(other, name) for name in names)


def _built(config: MoEConfig) -> Artifact:
    return first_use.build_once(default_store(), config, functools.partial(find, config, "llvm"), _logger.warning)
