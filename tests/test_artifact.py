"""Artifacts on disk: damaged ones are refused with a sentence, stores are searched, builds publish whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, TINY, environment, run_python

import moegen
from moegen import ArtifactError, BuildError, VerificationError, artifact, builder, reference, target
from moegen.artifact import MANIFEST, check_files, find_artifact, list_artifacts, manifest_digest, open_artifact

FILES = ("manifest.json", "moe.so", "te_source.py", "verification.json")


@pytest.fixture(scope="module")
def original(built: Any) -> moegen.Artifact:
    return built(verify=False, **TINY)


@pytest.fixture
def copy(original: moegen.Artifact, tmp_path: pathlib.Path) -> pathlib.Path:
    """An artifact of its own for a test to damage."""
    return shutil.copytree(original.path, tmp_path / "copy")


def refused(path: pathlib.Path) -> str:
    """The sentence with which loading fails."""
    with pytest.raises(ArtifactError) as caught:
        moegen.load(path)
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    assert len(message) < 600
    return message


def reseal(folder: pathlib.Path, **changes: Any) -> None:
    """Rewrites the manifest with other entries and a checksum that fits."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# ---------------------------------------------------------------- faults


def test_the_copy_is_fine(copy: pathlib.Path) -> None:
    assert sorted(p.name for p in copy.iterdir()) == sorted(FILES)
    module = moegen.load(copy)
    assert module.artifact.manifest["verified"] == "skipped"
    assert module.artifact.verification()["status"] == "skipped"
    assert module.artifact.library == copy / "moe.so"


@pytest.mark.parametrize("name", FILES)
def test_missing(name: str, copy: pathlib.Path) -> None:
    (copy / name).unlink()
    message = refused(copy)
    assert name in message or "no artifact" in message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", ["nothing", "half", "all but one"])
def test_truncated(name: str, keep: str, copy: pathlib.Path) -> None:
    data = (copy / name).read_bytes()
    kept = {"nothing": 0, "half": len(data) // 2, "all but one": len(data) - 1}[keep]
    (copy / name).write_bytes(data[:kept])
    if name == MANIFEST and keep == "all but one":
        assert data.endswith(b"\n"), "only the end of the last line is lost"
        moegen.load(copy)
    else:
        assert name in refused(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_grown_or_replaced(name: str, copy: pathlib.Path) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data + b"\0")
    assert "bytes instead of" in refused(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    assert name in refused(copy)
    (copy / name).rmdir()
    (copy / name).symlink_to("nowhere")
    assert name in refused(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_flipped(name: str, copy: pathlib.Path, rng: np.random.Generator) -> None:
    """One bit anywhere in a file is noticed."""
    data = (copy / name).read_bytes()
    places = {0, len(data) - 1, *rng.integers(0, len(data), 12).tolist()}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (copy / name).write_bytes(flipped)
        assert f"{name} was altered" in refused(copy)
    (copy / name).write_bytes(data)
    moegen.load(copy)


def test_flipped_manifest(copy: pathlib.Path, original: moegen.Artifact, rng: np.random.Generator) -> None:
    """One bit anywhere in the manifest is noticed, or (in white space) changes nothing that the manifest says."""
    data = (copy / MANIFEST).read_bytes()
    harmless = 0
    for place in {0, len(data) - 1, *rng.integers(0, len(data), 300).tolist()}:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (copy / MANIFEST).write_bytes(flipped)
        opened = None
        with contextlib.suppress(ArtifactError):
            opened = open_artifact(copy)
        if opened is None:
            assert MANIFEST in (message := refused(copy)) or "newer" in message
        else:
            harmless += 1
            assert dict(opened.manifest) == dict(original.manifest)
            assert opened.config == original.config
    assert harmless < 100


BAD_MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "number": b"3",
    "null": b"null",
    "list": b"[]",
    "text in quotes": b'"manifest"',
    "empty object": b"{}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "zeros": b"\0" * 4096,
    "nested lists": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "a huge number": b'{"schema_version": ' + b"9" * 10_000 + b"}",
    "infinity": b'{"schema_version": Infinity}',
    "a lone surrogate": b'{"schema_version": 1, "key": "\\ud800"}',
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_not_a_manifest(kind: str, copy: pathlib.Path) -> None:
    (copy / MANIFEST).write_bytes(BAD_MANIFESTS[kind])
    assert MANIFEST in refused(copy) or kind == "a huge number"


def test_every_entry_of_the_manifest_is_needed(copy: pathlib.Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    for name in manifest:
        less = {n: v for n, v in manifest.items() if n != name}
        (copy / MANIFEST).write_text(json.dumps(less))
        assert "damaged" in refused(copy)
    for name in ("key", "config", "packed_bytes", "files"):
        (copy / MANIFEST).write_text(json.dumps(manifest | {name: None}))
        assert "damaged" in refused(copy)


def test_newer_schema(copy: pathlib.Path) -> None:
    reseal(copy, schema_version=artifact.SCHEMA_VERSION + 1)
    assert "has schema 2, newer than" in refused(copy)
    (copy / MANIFEST).write_text('{"schema_version": 7}')  # whatever a later format looks like
    assert "newer" in refused(copy)


@pytest.mark.parametrize("schema", [0, -1, "1", None, 1.5])
def test_odd_schema(schema: Any, copy: pathlib.Path) -> None:
    """A schema that never was: refused, not read as if it were this one."""
    reseal(copy, schema_version=schema)
    refused(copy)


def test_made_by_a_later_moegen_of_the_same_schema(copy: pathlib.Path) -> None:
    """Fields and features that this moegen does not know, under a checksum that fits."""
    manifest = json.loads((copy / MANIFEST).read_text())
    for changes in (
        {"config": manifest["config"] | {"new_field": 3}},
        {"config": manifest["config"] | {"activation": "new"}},
        {"config": []},
        {"config": 7},
        {"target": manifest["target"] | {"new_field": 3}},
        {"target": manifest["target"] | {"features": ["newfeature"]}},
        {"target": manifest["target"] | {"features": None}},
        {"target": []},
    ):
        reseal(copy, **changes)
        refused(copy)


def test_malformed_files_entry(copy: pathlib.Path) -> None:
    """A manifest whose checksum fits but whose list of files does not make sense."""
    for files in (None, [], {"moe.so": {}}, {"moe.so": None}):
        reseal(copy, files=files)
        refused(copy)


def test_another_architecture(copy: pathlib.Path) -> None:
    other = {"x86_64": "aarch64"}.get(target.host_arch(), "x86_64")
    reseal(copy, target=json.loads((copy / MANIFEST).read_text())["target"] | {"arch": other})
    assert f"was compiled for {other}; this machine is {target.host_arch()}" in refused(copy)


@pytest.mark.skipif(target.host_arch() != "x86_64", reason="features are checked on x86-64")
def test_missing_cpu_features(original: moegen.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = target.host_cpu_flags()
    assert not target.missing_features(original.target)
    feature = original.target.features[-1]
    monkeypatch.setattr(target, "host_cpu_flags", lambda: flags - {target.X86_FEATURES[feature]})
    message = refused(original.path)
    assert f"was compiled for {original.target.mcpu}; this processor lacks {feature}: build it here, or with --mcpu" in message
    monkeypatch.setattr(target, "host_cpu_flags", frozenset)
    assert "this processor lacks" in refused(original.path)


def _another_library() -> bytes:
    """Some other shared library."""
    return pathlib.Path(np.linalg._umath_linalg.__file__).read_bytes()


def test_a_library_that_is_none(copy: pathlib.Path, original: moegen.Artifact) -> None:
    """Files that carry the right checksums and yet are no such library: an error, not a crash."""
    for content in (b"", b"not a library" * 100, _another_library()):
        (copy / "moe.so").write_bytes(content)
        artifact.seal(
            copy, {n: v for n, v in original.manifest.items() if n not in ("files", "manifest_sha256")} | {"x": len(content)}
        )
        files = json.loads((copy / MANIFEST).read_text())["files"]
        reseal(copy, files={n: v for n, v in files.items() if n != MANIFEST})
        assert "moe.so cannot be loaded" in refused(copy)


def test_nothing_is_mapped_before_the_check(copy: pathlib.Path) -> None:
    code = """
import sys, moegen
try:
    moegen.load(sys.argv[1])
except moegen.ArtifactError as error:
    assert sys.argv[1] not in open("/proc/self/maps").read()
    print(error)
"""
    data = bytearray((copy / "moe.so").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "moe.so").write_bytes(data)
    done = run_python(code, copy)
    assert done.returncode == 0, done.stderr
    assert "was altered" in done.stdout


@pytest.mark.parametrize("what", ["a file", "nowhere", "an empty folder", "a folder below a file"])
def test_paths_that_are_none(what: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    path = {
        "a file": file,
        "nowhere": tmp_path / "nowhere",
        "an empty folder": tmp_path / "empty",
        "a folder below a file": file / "x",
    }[what]
    (tmp_path / "empty").mkdir()
    assert "no artifact" in refused(path)
    with pytest.raises(ArtifactError):
        open_artifact(path)
    with pytest.raises(ArtifactError):
        moegen.verify(path)


def test_unreadable_files(copy: pathlib.Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (copy / "moe.so").chmod(0)
    assert "cannot be read" in refused(copy)


# ---------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def shelf(original: moegen.Artifact, built: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store with two layers."""
    folder = tmp_path_factory.mktemp("shelf")
    for one in (original, built(verify=False, **SMALL)):
        shutil.copytree(one.path, folder / one.name)
    return folder


def test_find(shelf: pathlib.Path, original: moegen.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_artifact(shelf, experts=2).config == original.config
    assert find_artifact(shelf, hidden=64, experts=4).config == moegen.MoEConfig(**SMALL)
    assert moegen.load(store=shelf, **TINY).config == original.config
    assert moegen.load(shelf, experts=2).config == original.config
    monkeypatch.setenv("MOEGEN_STORE", str(shelf))
    assert moegen.load(experts=4, top_k=2, hidden=64).config.intermediate == 96
    assert artifact.default_store() == shelf
    assert len(list_artifacts()) == 2


def test_find_none_or_several(shelf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"no artifact in .* has experts=9; there is: .*experts=2.*experts=4.*`moegen build` makes one"
    ) as none:
        moegen.load(store=shelf, experts=9)
    with pytest.raises(ArtifactError, match=r"2 artifacts have dtype=float32: say more fields.*experts=2.*experts=4") as several:
        moegen.load(store=shelf, dtype="float32")
    with pytest.raises(ArtifactError, match="2 artifacts have anything"):
        moegen.load(shelf)
    for store in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="there is: nothing"):
            moegen.load(store=store, experts=2)
    with pytest.raises(ArtifactError, match="'expert' is not a configuration field; known: activation,"):
        moegen.load(store=shelf, expert=2)
    with pytest.raises(ArtifactError, match="either a path or fields"):
        moegen.load(next(iter(sorted(shelf.iterdir()))), experts=2)
    for caught in (none, several):
        assert "\n" not in str(caught.value)


def test_a_crowded_store_is_not_listed_in_full(shelf: pathlib.Path, original: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    for n in range(12):
        shutil.copytree(original.path, tmp_path / f"layer-{n:02}", ignore=shutil.ignore_patterns("moe.so"))
        reseal(tmp_path / f"layer-{n:02}", config=original.config.to_dict() | {"intermediate": 100 + n})
    with pytest.raises(ArtifactError, match=r"12 artifacts have experts=2.*; and 4 more"):
        find_artifact(tmp_path, experts=2)


def test_the_newest_of_several_builds_of_a_layer(original: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    for name, created in (
        ("a", "2026-01-02T00:00:00+00:00"),
        ("b", "2026-01-03T00:00:00+00:00"),
        ("c", "2026-01-01T00:00:00+00:00"),
    ):
        shutil.copytree(original.path, tmp_path / name)
        reseal(tmp_path / name, created=created)
    assert find_artifact(tmp_path, **TINY).name == "b"


def test_what_this_processor_cannot_run_is_passed_over(original: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    for name in ("ours", "theirs"):
        shutil.copytree(original.path, tmp_path / name)
    reseal(tmp_path / "theirs", target=original.target.to_dict() | {"arch": "sparc"}, created="2999-01-01T00:00:00+00:00")
    assert find_artifact(tmp_path, **TINY).name == "ours"
    assert moegen.load(tmp_path).artifact.name == "ours"
    shutil.rmtree(tmp_path / "ours")
    with pytest.raises(ArtifactError, match="was compiled for sparc"):
        moegen.load(tmp_path)


def test_damaged_ones_are_listed_and_passed_over(shelf: pathlib.Path, original: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    shutil.copytree(original.path, tmp_path / "good")
    for name in ("bad", "worse", ".building-99999999-abc"):
        shutil.copytree(original.path, tmp_path / name)
    (tmp_path / "bad" / MANIFEST).write_text("{")
    (tmp_path / "worse" / MANIFEST).write_bytes(b"")
    (tmp_path / "stray").write_text("")
    (tmp_path / "notes").mkdir()
    listed = list_artifacts(tmp_path)
    assert [type(one) for one in listed] == [ArtifactError, moegen.Artifact, ArtifactError]
    assert "bad/manifest.json is damaged" in str(listed[0])
    assert find_artifact(tmp_path, **TINY).name == "good"


def test_default_store(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("MOEGEN_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert artifact.default_store() == tmp_path / ".cache" / "moegen"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert artifact.default_store() == tmp_path / ".cache" / "moegen"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert artifact.default_store() == tmp_path / "cache" / "moegen"
    monkeypatch.setenv("MOEGEN_STORE", "~/mine")
    assert artifact.default_store() == tmp_path / "mine"
    monkeypatch.setenv("MOEGEN_STORE", "")
    assert artifact.default_store() == tmp_path / "cache" / "moegen"
    with pytest.raises(ArtifactError, match="there is: nothing"):
        moegen.load(experts=2)
    assert list_artifacts() == []


# ---------------------------------------------------------------- publication

BUILD = """
import sys, moegen
from moegen.plan import plan
from moegen.geometry import Tiling
config = moegen.MoEConfig(experts=2, top_k=1, hidden=16, intermediate=16, activation="relu")
few_tiles = Tiling(lanes=4, max_rows=1, chunk_rows=16, k_block=64)  # quick to compile
try:
    made = moegen.build(plan(config, tiling=few_tiles), out=sys.argv[1])
    for _ in range(200):
        moegen.load(made.path)  # from now on it is there
    print(made.path)
except moegen.MoegenError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
"""


def _spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, original: moegen.Artifact) -> Callable[[], int]:
    """Builds in this process take what `original` has instead of compiling; returns how many there were."""
    count = itertools.count()
    calls: list[int] = []

    def fill(folder: pathlib.Path, todo: Any, verify: bool, known: Any) -> None:
        calls.append(next(count))
        for name in FILES[1:]:
            shutil.copy(original.path / name, folder / name)
        rest = {n: v for n, v in original.manifest.items() if n not in ("files", "manifest_sha256")}
        artifact.seal(folder, rest | {"key": todo.key, "config": todo.config.to_dict()})

    monkeypatch.setattr(builder, "_fill", fill)
    return lambda: len(calls)


CONFIG = moegen.MoEConfig(**TINY)


def test_two_processes_build_the_same(tmp_path: pathlib.Path) -> None:
    """At once, for real, each with its proof: both succeed, and one folder is there."""
    both = [_spawn(BUILD, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    paths = {output.strip() for output, _ in outputs}
    assert len(paths) == 1
    assert os.listdir(tmp_path) == [pathlib.Path(paths.pop()).name]
    made = open_artifact(next(tmp_path.iterdir()))
    check_files(made)
    assert made.manifest["verified"] == "passed"
    assert made.verification()["status"] == "passed"
    assert sorted(made.manifest["files"]) == sorted(FILES[1:])


def test_a_killed_build_is_cleared_by_the_next(tmp_path: pathlib.Path, quick: Callable[[], int]) -> None:
    process = _spawn(BUILD, tmp_path)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".building-*/work/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    alive = next(tmp_path.glob(".building-*"))
    other = moegen.build(moegen.MoEConfig(**TINY | {"experts": 3}), out=tmp_path)
    assert alive.is_dir(), "another build's folder was taken away while it ran"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert alive.is_dir()
    assert [one.name for one in list_artifacts(tmp_path)] == [other.name]  # type: ignore[union-attr]
    made = moegen.build(CONFIG, out=tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([made.name, other.name])


def test_skipped_when_already_there(tmp_path: pathlib.Path, quick: Callable[[], int]) -> None:
    first = moegen.build(CONFIG, out=tmp_path)
    stamp = (first.path / MANIFEST).stat()
    assert moegen.build(CONFIG, out=str(tmp_path)).path == first.path
    assert quick() == 1
    assert (first.path / MANIFEST).stat().st_mtime_ns == stamp.st_mtime_ns
    assert moegen.build(CONFIG, out=tmp_path, force=True).path == first.path
    assert quick() == 2
    assert (first.path / MANIFEST).stat().st_ino != stamp.st_ino
    assert moegen.build(moegen.MoEConfig(**TINY | {"experts": 3}), out=tmp_path).path != first.path
    assert len(list_artifacts(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "key", "a file instead", "emptied"])
def test_rebuilt_when_damaged(damage: str, tmp_path: pathlib.Path, quick: Callable[[], int]) -> None:
    made = moegen.build(CONFIG, out=tmp_path)
    if damage == "missing":
        (made.path / "te_source.py").unlink()
    elif damage == "truncated":
        (made.path / "moe.so").write_bytes(b"")
    elif damage == "manifest":
        (made.path / MANIFEST).write_text("[]")
    elif damage == "key":
        reseal(made.path, key="0" * 64)
    else:
        shutil.rmtree(made.path)
        made.path.mkdir() if damage == "emptied" else made.path.write_text("")
    again = moegen.build(CONFIG, out=tmp_path)
    assert quick() == 2
    assert again.path == made.path
    check_files(again)
    assert os.listdir(tmp_path) == [made.name]


def test_a_failing_proof_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], int]) -> None:
    real = builder._fill

    def fill(folder: pathlib.Path, todo: Any, verify: bool, known: Any) -> None:
        real(folder, todo, verify, known)
        raise VerificationError("the compiled module is wrong and was thrown away: off")

    good = moegen.build(moegen.MoEConfig(**TINY | {"experts": 3}), out=tmp_path)
    monkeypatch.setattr(builder, "_fill", fill)
    with pytest.raises(VerificationError, match="thrown away"):
        moegen.build(CONFIG, out=tmp_path)
    with pytest.raises(VerificationError):
        moegen.build(good.config, out=tmp_path, force=True)
    assert os.listdir(tmp_path) == [good.name], "the one that was there stays"
    check_files(open_artifact(good.path))


def test_of_two_builds_at_once_the_first_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], int]
) -> None:
    """Whoever comes second finds the same artifact published and whole, and leaves it to those who read it."""
    made = moegen.build(CONFIG, out=tmp_path)
    stamp = (made.path / MANIFEST).stat()
    real, answers = builder._already_built, iter([None])

    def already_built(*given: Any) -> moegen.Artifact | None:
        return next(answers, None) if quick() < 2 else real(*given)  # not there when the second build begins

    monkeypatch.setattr(builder, "_already_built", already_built)
    again = moegen.build(CONFIG, out=tmp_path)
    assert quick() == 2
    assert again.path == made.path
    assert (made.path / MANIFEST).stat().st_ino == stamp.st_ino
    assert os.listdir(tmp_path) == [made.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_whatever_happens_leaves_nothing(
    error: type[BaseException], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(folder: pathlib.Path, todo: Any, verify: bool, known: Any) -> None:
        (folder / "half").write_text("")
        raise error

    monkeypatch.setattr(builder, "_fill", fill)
    with pytest.raises(error):
        moegen.build(CONFIG, out=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EIO"])
@pytest.mark.parametrize("where", ["fill", "publish"])
def test_a_full_disk(
    code: str, where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], int]
) -> None:
    import errno

    number = getattr(errno, code)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((builder, "_fill") if where == "fill" else (artifact, "publish")), fail)
    with pytest.raises(BuildError, match=rf"cannot write the artifact to .*{os.strerror(number)}") as caught:
        moegen.build(CONFIG, out=tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kilobytes", [24, 100, 200])
def test_a_disk_that_fills_up(kilobytes: int, tmp_path: pathlib.Path) -> None:
    """For real, on a small file system of its own: too small for the sources, the objects, the library."""
    show = 'code=$?; ls -A "$0" >&2; exit $code'
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$0" && "$@"; {show}'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(tmp_path)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no file system of one's own here")
    done = subprocess.run(
        [*command, sys.executable, "-c", BUILD, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout.startswith(("BuildError: ", "ArtifactError: "))
    assert done.stdout.count("\n") == 1
    assert done.stderr == "", "something was left behind, or a traceback shown"


def test_stores_that_cannot_be_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], int]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write to '.*/file'"):
        moegen.build(CONFIG, out=tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot write to '.*/file/store'"):
        moegen.build(CONFIG, out=tmp_path / "file" / "store")
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(ArtifactError, match=r"cannot write to .*Permission denied"):
            moegen.build(CONFIG, out=locked)
    real = pathlib.Path.mkdir

    def mkdir(self: pathlib.Path, *given: Any, **named: Any) -> None:
        if self.name.startswith(".building-"):
            raise PermissionError(13, "Permission denied")
        real(self, *given, **named)

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    with pytest.raises(ArtifactError, match=r"cannot write to .*Permission denied"):
        moegen.build(CONFIG, out=tmp_path / "read-only")
    assert quick() == 0


def test_a_found_layer_needs_no_write_access(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, quick: Callable[[], int]
) -> None:
    made = moegen.build(CONFIG, out=tmp_path)

    def fail(*_: Any) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(artifact, "unpublished", fail)
    assert moegen.build(CONFIG, out=tmp_path).path == made.path


def test_readers_see_whole_artifacts_only(tmp_path: pathlib.Path, quick: Callable[[], int]) -> None:
    """While builds replace it again and again, a reader finds the artifact whole, or (between two renames) not at all."""
    made = moegen.build(CONFIG, out=tmp_path)
    reader = """
import sys, time, moegen
from moegen.artifact import check_files, open_artifact
whole = absent = 0
print("ready", flush=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        check_files(open_artifact(sys.argv[1]))
        whole += 1
    except moegen.ArtifactError as error:
        assert any(part in str(error) for part in ("no artifact", "not an artifact", "cannot be read")), error
        absent += 1
print(whole, absent)
"""
    process = _spawn(reader, made.path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while process.poll() is None:
        moegen.build(CONFIG, out=tmp_path, force=True)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    whole, absent = map(int, output.split())
    assert whole > absent
    assert os.listdir(tmp_path) == [made.name]


def test_a_loaded_module_survives_its_replacement(tmp_path: pathlib.Path, quick: Callable[[], int]) -> None:
    made = moegen.build(CONFIG, out=tmp_path)
    layer = moegen.load(made.path).bind(reference.random_weights(CONFIG, np.random.default_rng(0)))
    x = np.ones((3, 16), np.float32)
    y = layer(x)
    moegen.build(CONFIG, out=tmp_path, force=True)
    np.testing.assert_array_equal(layer(x), y)
    shutil.rmtree(made.path)
    np.testing.assert_array_equal(layer(x), y)
