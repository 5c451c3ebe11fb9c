"""Artifacts for the ranks: found in the store, or built there by one of a machine's processes while the others wait.

The compiler brings an LLVM that can clash with torch's in one process, so that it runs in one of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

from ..artifact import Artifact, check_loadable, default_store, list_artifacts
from ..config import MoEConfig, config_key
from ..errors import ArtifactError, BuildError
from ..paths import PACKAGE

_POLL_SECONDS = 0.1


def artifact_for(config: MoEConfig, target: str, store: str | os.PathLike[str] | None, limit_s: float) -> Artifact:
    """The artifact of `config`, built first if this machine's processor is the target and there is none.

    Args:
        limit_s: seconds for building, or for waiting until another process has built.

    Raises:
        ArtifactError: there is none for CUDA, or the store cannot be written.
        BuildError: building failed, or took too long.
    """
    folder = pathlib.Path(store) if store is not None else default_store()
    if (found := _found(config, target, folder)) is not None:
        return found
    if target != "llvm":
        raise ArtifactError(f"{str(folder)!r} has no artifact of {config} for {target}: build what `local_configs` names first")
    with _alone(config, folder, limit_s):
        if (found := _found(config, target, folder)) is None:  # unless another process has built meanwhile
            _build(config, folder, limit_s)
            found = _found(config, target, folder)
    if found is None:
        raise BuildError(f"{config} was built into {str(folder)!r}, and this machine cannot load it")
    return found


def _found(config: MoEConfig, target: str, folder: pathlib.Path) -> Artifact | None:
    """The newest loadable artifact of this very configuration, those for more of the processor's features first."""
    fitting = [a for a in list_artifacts(folder) if isinstance(a, Artifact) and a.config == config and a.target.kind == target]
    fitting.sort(key=lambda a: (len(a.target.features), str(a.manifest.get("created", ""))), reverse=True)
    for artifact in fitting:
        with contextlib.suppress(ArtifactError):  # damaged, or for another processor
            check_loadable(artifact)
            return artifact
    return None


@contextlib.contextmanager
def _alone(config: MoEConfig, folder: pathlib.Path, limit_s: float) -> Iterator[None]:
    """Lets one process at a time build a layer; the lock goes when its holder does."""
    deadline = time.monotonic() + limit_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".lock-{hashlib.sha256(config_key(config).encode()).hexdigest()[:16]}").open("w")
    except OSError as error:
        raise ArtifactError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    with lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise BuildError(f"another process has not built {config} within start_timeout_s={limit_s:g}")
            time.sleep(_POLL_SECONDS)
        yield


def _build(config: MoEConfig, folder: pathlib.Path, limit_s: float) -> None:
    """`moegen build`, as its user would call it."""
    path = os.pathsep.join(part for part in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "moegen", "build", *_options(config), "--out", str(folder)],
            env=os.environ | {"PYTHONPATH": path, "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"building {config} took longer than start_timeout_s={limit_s:g}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise BuildError(f"building {config} failed: {said.removeprefix('Error: ')}")


def _options(config: MoEConfig) -> list[str]:
    """`config` as options of `moegen build`, those that are not the default."""
    options: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default or value is None:
            continue
        options += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options
