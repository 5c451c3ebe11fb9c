"""Artifacts on disk: one folder per compiled layer, published atomically, checked before anything of it is mapped.

<store>/<name>/manifest.json   what it is: schema, configuration, target, functions, weight layout, checksums
               moe.so          the self-contained library
               te_source.py    the tensor-expression module it was compiled from
               verification.json  the numerical proof
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .config import MoEConfig
from .errors import ArtifactError, MoegenError
from .target import Target, host_arch, missing_features

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LIBRARY = "moe.so"
TE_SOURCE = "te_source.py"
VERIFICATION = "verification.json"
_TEMPORARY = ".building-"
_REQUIRED = ("schema_version", "key", "config", "target", "tiling", "segments", "packed_bytes", "max_tokens", "files", "versions")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled layer on disk.

    Args:
        path: its folder.
        config: the layer.
        target: what it was compiled for.
        manifest: everything that `manifest.json` says.
    """

    path: pathlib.Path
    config: MoEConfig
    target: Target
    manifest: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def library(self) -> pathlib.Path:
        """The shared library."""
        return self.path / LIBRARY

    def verification(self) -> dict[str, Any]:
        """The report of the numerical proof that the build made."""
        return _read_json(self.path / VERIFICATION)


def default_store() -> pathlib.Path:
    """The user's store: $MOEGEN_STORE, or `moegen` in the user's cache folder."""
    if chosen := os.environ.get("MOEGEN_STORE"):
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "moegen"


# ---------------------------------------------------------------- reading


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """The artifact in folder `path`, with its manifest checked; no other file is read.

    Raises:
        ArtifactError: it is not there, damaged, or made by a newer moegen.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact folder {str(folder)!r}")
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{str(folder)!r} is not an artifact: it has no {MANIFEST}")
    manifest = _read_json(folder / MANIFEST)
    schema = manifest.get("schema_version")
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        raise ArtifactError(f"{folder.name} has schema {schema}, newer than this moegen reads ({SCHEMA_VERSION}): upgrade it")
    damaged = f"{folder.name}/{MANIFEST} is damaged: build the artifact again"
    if schema != SCHEMA_VERSION or isinstance(schema, bool | float) or not _whole(manifest):
        raise ArtifactError(damaged)
    try:
        return Artifact(folder, MoEConfig.from_dict(manifest["config"]), Target.from_dict(manifest["target"]), manifest)
    except (MoegenError, TypeError, KeyError) as error:
        raise ArtifactError(damaged) from error


def _whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all its parts, as they were when it was sealed."""
    if any(name not in manifest for name in _REQUIRED) or manifest.get("manifest_sha256") != manifest_digest(manifest):
        return False
    files = manifest["files"]
    return (
        isinstance(files, dict)
        and {LIBRARY, TE_SOURCE} <= set(files)
        and all(
            isinstance(f, dict) and isinstance(f.get("bytes"), int) and isinstance(f.get("sha256"), str) and "/" not in name
            for name, f in files.items()
        )
    )


def check_loadable(artifact: Artifact) -> None:
    """That this machine can run the artifact and that no file was changed.

    Raises:
        ArtifactError: another architecture, missing CPU features, or a missing, truncated or altered file.
    """
    if artifact.target.arch != host_arch():
        raise ArtifactError(f"{artifact.name} was compiled for {artifact.target.arch}; this machine is {host_arch()}")
    if missing := missing_features(artifact.target):
        raise ArtifactError(
            f"{artifact.name} was compiled for {artifact.target.mcpu}; this processor lacks {', '.join(missing)}: "
            "build it here, or with --mcpu for this processor"
        )
    check_files(artifact)


def check_files(artifact: Artifact) -> None:
    """That no file was changed since the artifact was sealed.

    Raises:
        ArtifactError: a file is missing, truncated or altered.
    """
    for name, expected in artifact.manifest["files"].items():
        _check_file(artifact.path / name, expected)


def _check_file(path: pathlib.Path, expected: Mapping[str, Any]) -> None:
    name = f"{path.parent.name}/{path.name}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read ({error.strerror}): build the artifact again") from error
    if len(data) != expected["bytes"]:
        raise ArtifactError(f"{name} has {len(data)} bytes instead of {expected['bytes']}: build the artifact again")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ArtifactError(f"{name} was altered (its SHA-256 differs from the manifest's): build the artifact again")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    name = f"{path.parent.name}/{path.name}"
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is damaged: build the artifact again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is damaged: build the artifact again")
    return value


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the store


def list_artifacts(store: str | os.PathLike[str] | None = None) -> list[Artifact | ArtifactError]:
    """All artifacts of a store by name; for a damaged one, the error that opening it gives."""
    folder = pathlib.Path(store) if store is not None else default_store()
    found: list[Artifact | ArtifactError] = []
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path / MANIFEST).exists():
            continue
        try:
            found.append(open_artifact(path))
        except ArtifactError as error:
            found.append(error)
    return found


def find_artifact(store: str | os.PathLike[str] | None = None, target: str | None = None, **fields: Any) -> Artifact:
    """The one artifact of a store whose configuration has these fields.

    Artifacts that this processor cannot run are passed over when another fits; of the same layer, the newest is taken.
    With `target`, only those for that kind of target are looked at; without, those for CPUs come first.

    Raises:
        ArtifactError: none fits or several different ones do; the message says what there is.
    """
    known = {f.name for f in dataclasses.fields(MoEConfig)}
    if unknown := sorted(set(fields) - known):
        raise ArtifactError(f"{unknown[0]!r} is not a configuration field; known: {', '.join(sorted(known))}")
    folder = pathlib.Path(store) if store is not None else default_store()
    present = [a for a in list_artifacts(folder) if isinstance(a, Artifact) and target in (None, a.target.kind)]
    fitting = [a for a in present if all(getattr(a.config, name) == value for name, value in fields.items())]
    wanted = ", ".join(f"{name}={value}" for name, value in (fields | ({"target": target} if target else {})).items()) or "anything"
    if not fitting:
        there = _listing(present) if present else "nothing"
        raise ArtifactError(f"no artifact in {str(folder)!r} has {wanted}; there is: {there}; `moegen build` makes one")
    runnable = [a for a in fitting if a.target.arch == host_arch() and not missing_features(a.target)] or fitting
    if len({a.config for a in runnable}) > 1:
        raise ArtifactError(f"{len(runnable)} artifacts have {wanted}: say more fields or load one by path: {_listing(runnable)}")
    return max(runnable, key=lambda a: (len(a.target.features), str(a.manifest.get("created", ""))))


def _listing(artifacts: list[Artifact]) -> str:
    shown = "; ".join(f"{a.name} ({a.config})" for a in artifacts[:8])
    return shown + (f"; and {len(artifacts) - 8} more" if len(artifacts) > 8 else "")


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def unpublished(store: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder inside `store`, removed at the end whatever happens; leftovers of killed builds are cleared first."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        clear_leftovers(store)
        folder = store / f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}"
        folder.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {str(store)!r}: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(store: pathlib.Path) -> None:
    """Removes the temporary folders of builds whose process is gone."""
    for leftover in store.glob(f"{_TEMPORARY}*"):
        if not _alive(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(name: str) -> bool:
    pid = name.removeprefix(_TEMPORARY).partition("-")[0]
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def seal(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with the checksum of every file in `folder`, and brings all of them to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _sync(path)
    sealed = json.loads(json.dumps(manifest | {"files": files}))
    sealed["manifest_sha256"] = manifest_digest(sealed)
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def publish(folder: pathlib.Path, final: pathlib.Path, keep: Callable[[], bool] = lambda: False) -> None:
    """Renames a sealed folder to its final name.

    Args:
        keep: asked when something is there already: whether it stays (another build of the same was first). Otherwise it is
            replaced; readers see the old one, nothing for the moment between two renames, or the new one.
    """
    old = final.with_name(f"{_TEMPORARY}{os.getpid()}-old-{os.urandom(4).hex()}")
    try:
        for _ in range(100):
            try:
                os.rename(folder, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if keep():
                    return
                with contextlib.suppress(FileNotFoundError):
                    os.rename(final, old)
                    os.rename(folder, final)
                    break
            else:
                break
        else:
            raise ArtifactError(f"{str(final)!r} is being replaced by other builds without end")
        _sync(final.parent)
    finally:
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
