"""Artifacts that are wanted now: found in a store, or built there by one of a machine's processes while the others wait.

The compiler brings an LLVM that can clash with torch's in one process, so nothing here imports it: it runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from .artifact import Artifact, check_loadable, list_artifacts
from .config import MoEConfig, config_key
from .errors import ArtifactError, BuildError
from .own_processes import environment

_POLL_SECONDS = 0.1


def find(folder: pathlib.Path, config: MoEConfig, target: str, fits: Callable[[MoEConfig], bool] | None = None) -> Artifact | None:
    """The artifact in `folder` that computes `config` for a target and that this machine can load, or None.

    The very configuration comes before others that fit, then the one for the most features of the processor, then the newest.

    Args:
        target: "llvm" or "cuda".
        fits: what else would do; None for nothing else.
    """
    fitting = [
        a
        for a in list_artifacts(folder)
        if isinstance(a, Artifact) and a.target.kind == target and (a.config == config or (fits is not None and fits(a.config)))
    ]
    fitting.sort(key=lambda a: (a.config == config, len(a.target.features), str(a.manifest.get("created", ""))), reverse=True)
    for artifact in fitting:
        with contextlib.suppress(ArtifactError):  # for another processor, or damaged: the next one, or a new one
            check_loadable(artifact)
            return artifact
    return None


def build_once(
    folder: pathlib.Path,
    config: MoEConfig,
    found: Callable[[], Artifact | None],
    say: Callable[[str], None] = lambda line: None,
    limit_s: float | None = None,
    limit_name: str = "limit_s",
) -> Artifact:
    """Builds `config` for this processor into `folder`, unless `found` finds it once other processes have built.

    Args:
        found: looks the artifact up.
        say: is told what is being built, and what was.
        limit_s: seconds for building, and for waiting for another process; None for as long as it takes.
        limit_name: what the caller calls them.

    Raises:
        ArtifactError: the folder cannot be written.
        BuildError: building failed or took too long, or what was built cannot be loaded.
    """
    limit = f"{limit_name}={limit_s:g}" if limit_s is not None else ""
    with _alone(folder, config, limit_s, limit):
        if (artifact := found()) is not None:  # another process was first
            return artifact
        say(f"moegen: building {config} into {folder}, once; this takes some seconds")
        _build(folder, config, limit_s, limit)
        if (artifact := found()) is None:
            raise BuildError(
                f"{config} was built into {str(folder)!r} and cannot be loaded: `moegen list --out {folder}` says more"
            )
        say(f"moegen: built {artifact.name}")
        return artifact


def options_of(config: MoEConfig) -> list[str]:
    """`config` as options of `moegen build`, those that are not the default."""
    options: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if value is None or value == field.default:
            continue
        options += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options


@contextlib.contextmanager
def _alone(folder: pathlib.Path, config: MoEConfig, limit_s: float | None, limit: str) -> Iterator[None]:
    """Lets one process at a time build a layer; the lock is let go of when its holder dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".lock-{hashlib.sha256(config_key(config).encode()).hexdigest()[:16]}").open("w")
    except OSError as error:
        raise ArtifactError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    began = time.monotonic()
    with lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise BuildError(f"another process has not built {config} within {limit}")
            time.sleep(_POLL_SECONDS)
        yield


def _build(folder: pathlib.Path, config: MoEConfig, limit_s: float | None, limit: str) -> None:
    """`moegen build`, as its user would call it, in a process that never sees torch."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "moegen", "build", *options_of(config), "--out", str(folder)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"building {config} took longer than {limit}") from None
    if done.returncode < 0:
        raise BuildError(
            f"building {config} was ended by {signal.Signals(-done.returncode).name}: if memory ran out, build it ahead of time, "
            f"with `moegen build {' '.join(options_of(config))}`"
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BuildError(f"building {config} failed: {said.removeprefix('Error: ')}")
