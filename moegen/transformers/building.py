"""Artifacts for experts: found in the user's store, or built there in a process of its own.

The compiler brings an LLVM that can clash with torch's in one process, so nothing here imports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from ..artifact import Artifact, check_loadable, default_store, list_artifacts
from ..config import MoEConfig, config_key
from ..device import DeviceModule
from ..errors import ArtifactError, BuildError
from ..paths import PACKAGE
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
            f"`moegen build {' '.join(_options(config, differing=True))} --target cuda`"
        )
    artifact = artifact or _built(config)
    key = (artifact.path.resolve(), device)
    if key not in _loaded:
        _loaded[key] = module_of(artifact, None, int(index or 0))
    return _loaded[key]


def find(config: MoEConfig, target: str) -> Artifact | None:
    """The store's artifact for the routed experts of `config` that this machine can load, or None.

    The same layer is preferred to one with another router, then the one for the most features of the processor, then the newest.
    """
    fitting = [
        a for a in list_artifacts() if isinstance(a, Artifact) and a.target.kind == target and _same_experts(a.config, config)
    ]
    fitting.sort(key=lambda a: (a.config == config, len(a.target.features), str(a.manifest.get("created", ""))), reverse=True)
    for artifact in fitting:
        with contextlib.suppress(ArtifactError):  # for another processor, or damaged: the next one, or a new one
            check_loadable(artifact)
            return artifact
    return None


def _same_experts(a: MoEConfig, b: MoEConfig) -> bool:
    names = {*_EXPERTS_FIELDS, *_OF_CLAMPED}
    if b.activation != "swiglu_clamped":
        names -= set(_OF_CLAMPED)
    if not b.low_bit:
        names -= set(_OF_LOW_BIT)
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _built(config: MoEConfig) -> Artifact:
    store = default_store()
    with _alone(store, config):
        if (found := find(config, "llvm")) is not None:  # another process was first
            return found
        _logger.warning("moegen: building %s into %s, once; this takes some seconds", config, store)
        path = _build(config, store)
        _logger.warning("moegen: built %s", path.name)
        if (found := find(config, "llvm")) is None:
            raise BuildError(f"{str(path)!r} was built and cannot be loaded: `moegen inspect {path.name}` says more")
        return found


@contextlib.contextmanager
def _alone(store: pathlib.Path, config: MoEConfig) -> Iterator[None]:
    """Lets one process at a time build a layer; the lock is let go of when its holder dies."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / f".lock-{hashlib.sha256(config_key(config).encode()).hexdigest()[:16]}").open("w")
    except OSError as error:
        raise ArtifactError(f"cannot write to {str(store)!r}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(config: MoEConfig, store: pathlib.Path) -> pathlib.Path:
    """`moegen build`, as its user would call it, in a process that never sees torch."""
    path = os.pathsep.join(part for part in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "moegen", "build", *_options(config), "--out", str(store), "--json"],
        env=os.environ | {"PYTHONPATH": path, "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise BuildError(
            f"building {config} was ended by {signal.Signals(-done.returncode).name}: if memory ran out, build it ahead of time, "
            "with `moegen build --model config.json`"
        )
    try:
        result = json.loads(done.stdout)["results"][0]
    except (ValueError, LookupError, TypeError):
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BuildError(f"building {config} failed: {said.removeprefix('Error: ')}") from None
    if "error" in result:
        raise BuildError(f"building {config} failed: {result['error']}")
    return pathlib.Path(result["path"])


def _options(config: MoEConfig, differing: bool = False) -> list[str]:
    """`config` as options of `moegen build`; with `differing`, those alone that are not the default."""
    options: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value is None or (differing and value == field.default):
            continue
        options += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options
