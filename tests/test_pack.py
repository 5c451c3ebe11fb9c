"""Packed files: the same bits as packing at every start, nothing half, nothing foreign, memory of one expert."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import save
from click.testing import CliRunner
from helpers import SMALL, environment, run_python, stored, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moegen
from moegen import WeightsError, reference
from moegen.artifact import seal
from moegen.cli import main
from moegen.moepack import MoePack, is_moepack
from moegen.pack import pack
from moegen.pack.finding import layers_of

PRELUDE_BYTES = 192
MODEL = {
    "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 96,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(built: Any) -> moegen.Artifact:
    made = built(verify=False, **SMALL)
    assert isinstance(made, moegen.Artifact)
    return made


@pytest.fixture(scope="module")
def weights(artifact: moegen.Artifact) -> dict[str, np.ndarray]:
    """Values that bfloat16 holds."""
    made = reference.random_weights(artifact.config, np.random.default_rng(5))
    return {name: w.astype(ml_dtypes.bfloat16).astype(np.float32) for name, w in made.items()}


@pytest.fixture(scope="module")
def packed(artifact: moegen.Artifact, weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file that tests only read."""
    path = tmp_path_factory.mktemp("packed") / "layer.moepack"
    pack(weights, path, artifact)
    return path


@pytest.fixture
def copy(packed: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A file that a test may spoil."""
    return pathlib.Path(shutil.copy(packed, tmp_path))


def mixtral(weights: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Names as in a checkpoint of Mixtral, in bfloat16, and others that are not the experts'."""
    root = f"model.layers.{layer}."
    found = {f"{root}block_sparse_moe.gate.weight": weights["router.weight"], f"{root}input_layernorm.weight": np.ones(64)}
    for short, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        for e, matrix in enumerate(weights[f"experts.{name}.weight"]):
            found[f"{root}block_sparse_moe.experts.{e}.{short}.weight"] = matrix
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in found.items()}


@pytest.fixture
def checkpoint(weights: dict[str, np.ndarray], tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a sharded checkpoint: layers 2 and 3, each over both shards, and the configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    halved = {name: w / 2 for name, w in weights.items()}
    everything = mixtral(halved, 2) | mixtral(weights, 3)
    parts = [dict(list(everything.items())[::2]), dict(list(everything.items())[1::2])]
    for i, part in enumerate(parts):
        save(folder / f"model-{i}.safetensors", part)
    weight_map = {name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


# ---------------------------------------------------------------- the same bits


def test_the_same_output_and_the_same_bytes(
    artifact: moegen.Artifact, weights: dict[str, np.ndarray], packed: pathlib.Path, rng: np.random.Generator
) -> None:
    module = moegen.load(artifact.path, threads=2)
    layer, mapped = module.bind(weights), module.bind(packed, verify=True)
    x = tokens(artifact.config, 33, rng)
    np.testing.assert_array_equal(mapped(x), layer(x))
    ids, factors = np.asarray(layer.route(x).ids), np.asarray(layer.route(x).weights)
    np.testing.assert_array_equal(mapped.route(x).ids, ids)
    np.testing.assert_array_equal(mapped.experts(x, ids, factors), layer.experts(x, ids, factors))
    assert mapped.profile(x).keys() == layer.profile(x).keys()
    for segment in artifact.manifest["segments"]:
        place = slice(segment["offset_bytes"], segment["offset_bytes"] + segment["size_bytes"])
        np.testing.assert_array_equal(mapped.packed[place], layer.packed[place])
    again = pack(weights, packed.with_name("again.moepack"), artifact, threads=1)
    assert pathlib.Path(again.path).read_bytes() == packed.read_bytes()


def test_it_is_mapped_and_not_copied(artifact: moegen.Artifact, packed: pathlib.Path) -> None:
    layer = moegen.load(artifact.path).bind(str(packed))
    assert not layer.packed.flags.writeable
    address = layer.packed.__array_interface__["data"][0]
    maps = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if line.endswith(packed.name)]
    spans = [tuple(int(part, 16) for part in line[0].split("-")) for line in maps if line[1] == "r--s"]
    assert any(begin <= address and address + layer.packed_bytes <= end for begin, end in spans)
    with pytest.raises(ValueError, match="read-only"):
        layer.packed[0] = 1
    own = moegen.load(artifact.path).bind(str(packed), copy=True)
    np.testing.assert_array_equal(own.packed, layer.packed)
    own.packed[0] ^= 1
    assert own.packed[0] != layer.packed[0]


def test_from_a_sharded_checkpoint(
    artifact: moegen.Artifact, checkpoint: pathlib.Path, packed: pathlib.Path, store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The folder, its index or names to arrays; by number or by prefix; the artifact by path or by the model's configuration."""
    prefix = "model.layers.3.block_sparse_moe."
    index = checkpoint / "model.safetensors.index.json"
    payload = MoePack(packed).payload
    by_model = {"layer": 3, "model": MODEL | {"torch_dtype": "float32"}}
    for path, said in ((checkpoint, {"layer": 3}), (index, {"prefix": prefix}), (index, by_model)):
        made = pack(path, tmp_path / "x.moepack", None if "model" in said else artifact.path, store=store, **said)
        np.testing.assert_array_equal(made.payload, payload)
        assert made.header.source == {"file": path.name, "prefix": prefix}


def test_command(
    artifact: moegen.Artifact, checkpoint: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    only = tmp_path / "store"  # of which nothing else fits the model
    shutil.copytree(artifact.path, only / artifact.name)
    assert f"for {artifact.name}" in run("pack", checkpoint, "--layer", 3, "--store", only)
    np.testing.assert_array_equal(MoePack("layer3.moepack").payload, MoePack(packed).payload)
    several = ("pack", checkpoint, "--layer", "all", "--out", "packed{layer}", "--artifact", artifact.path, "--json")
    assert run(*several).count('"source"') == 2
    assert is_moepack("packed2")
    halved = moegen.load(artifact.path).bind("packed2").packed
    assert not np.array_equal(halved, MoePack(packed).payload)
    shown = run("inspect", "layer3.moepack")
    assert all(word in shown for word in (artifact.name, "E4 K2 H64 I96 float32", "model.layers.3.block_sparse_moe.", "down"))
    assert json.loads(run("inspect", "packed3", "--json"))["packed_bytes"] == artifact.manifest["packed_bytes"]
    assert "layer3.moepack: sound, " in run("verify", "layer3.moepack")
    assert json.loads(run("verify", "packed3", "--json"))["status"] == "sound"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--layer", "7"], 1, "layer 7 has no experts; layers with experts: 2-3"),
        (["--layer", "2,x"], 2, "--layer 2,x is not a number"),
        (["--layer", "3-2"], 2, "--layer 3-2 is not a number"),
        (["--layer", "2-3", "--out", "one.moepack"], 2, r"would hold 2 layers: put \{layer\} into its name"),
        (["--layer", "2", "--prefix", "x"], 2, "give one of them"),
        (["--prefix", "model.layers.9."], 1, "no weight name starts with 'model.layers.9.'"),
        ([], 1, "unknown weight names: .* layers are at prefix='model.layers.2.block_sparse_moe.'"),
        (["--layer", "3", "--out", "model/config.json"], 1, "not a file of packed weights: it will not be replaced"),
        (["--layer", "3", "--out", "model"], 1, "is a folder"),
        (["--layer", "3", "--out", "nowhere/x.moepack"], 1, "cannot write 'nowhere/x.moepack': No such file"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, said: str, artifact: moegen.Artifact, checkpoint: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    before = sorted(path for path in checkpoint.parent.rglob("*"))
    assert re.search(said, run("pack", "model", *arguments, "--artifact", artifact.path, code=code))
    assert sorted(path for path in checkpoint.parent.rglob("*")) == before


def test_finding_refusals(artifact: moegen.Artifact, checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out, nothing = tmp_path / "x.moepack", tmp_path / "nothing"
    for change, reason in (
        ({}, "no artifact in .*/nothing' is for"),
        ({"hidden_size": 32}, "no artifact in"),
        ({"model_type": "x"}, "x"),
    ):
        with pytest.raises(moegen.MoegenError, match=reason):
            pack(checkpoint, out, layer=3, model=MODEL | change, store=nothing)
    save(tmp_path / "a.safetensors", {"layers.3.experts.x": np.ones(3)})
    with pytest.raises(moegen.ArtifactError, match=r"config\.json.*--artifact"):
        pack(tmp_path, out, layer=3)
    assert f"there is no checkpoint '{nothing}'" in run("pack", nothing, "--layer", 3, code=1)
    with pytest.raises(WeightsError, match="cannot read the weights"):
        pack(nothing, out, artifact, layer=3)
    with pytest.raises(WeightsError, match="artifact= or model="):
        pack({}, out)
    with pytest.raises(WeightsError, match="give one of them"):
        pack(checkpoint, out, artifact, layer=3, prefix="model.")
    twice = {"a.layers.3.mlp.experts.0.w1.weight": 0, "b.layers.3.mlp.experts.0.w1.weight": 0, "layers.x.experts": 0, "c.²": 0}
    assert layers_of(twice) == {3: ["a.layers.3.mlp.", "b.layers.3.mlp."]}
    with pytest.raises(WeightsError, match=r"layer 3 is at prefix='a\.layers\.3\.mlp\.', 'b\."):
        pack(twice, out, artifact, layer=3)


# ---------------------------------------------------------------- the wrong file


def changed(path: pathlib.Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b""), "not a file of packed weights .it is empty"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1\0" + bytes(500)), "it begins with b'.x93NUMPY"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "100 bytes, less than the 192"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"truncated, \d+ bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long"),
        (lambda path: changed(path, 8, struct.pack("<I", 2)), "format 2, newer than this moegen reads"),
        (lambda path: changed(path, 12, struct.pack("<I", 2**32 - 1)), "header has 4294967295 bytes"),
        (lambda path: changed(path, 16, struct.pack("<Q", 2**64 - 1)), "payload is at 18446744073709551615"),
        (lambda path: changed(path, 24, struct.pack("<Q", 2**64 - 1)), "truncated"),
        (lambda path: changed(path, 32, struct.pack("<I", 65)), "contradict"),
        (lambda path: changed(path, 300, b"\xff"), "differs from its checksum"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_damage_that_loading_sees(
    spoil: Callable[[pathlib.Path], Any], said: str, artifact: moegen.Artifact, copy: pathlib.Path
) -> None:
    spoil(copy)
    with pytest.raises(WeightsError, match=said) as caught:
        moegen.load(artifact.path).bind(copy)
    assert str(copy) in str(caught.value)
    assert "Error: " in run("verify", copy, code=1)


def test_every_byte_counts(packed: pathlib.Path, copy: pathlib.Path) -> None:
    """One flipped bit anywhere: loading or verifying says so, and where it was in the payload, which expert's it is."""
    rng, content = np.random.default_rng(), bytearray(packed.read_bytes())
    start = struct.unpack_from("<Q", content, 16)[0]
    for at in (*rng.integers(0, len(content), 60).tolist(), *rng.integers(0, start, 20).tolist(), 191, start - 1, len(content) - 1):
        content[at] ^= 1 << rng.integers(8)
        copy.write_bytes(content)
        with pytest.raises(WeightsError, match=r"layer\.moepack"):
            MoePack(copy).verify()
        content = bytearray(packed.read_bytes())
    segments = {s.name: s for s in MoePack(packed).header.segments}
    down = segments["down"]
    content[start + down.offset_bytes + 2 * down.unit_bytes + 7] ^= 1
    copy.write_bytes(content)
    with pytest.raises(WeightsError, match=r"expert 2 of down \(bytes \d+ to \d+\) differs from its checksum"):
        MoePack(copy).verify()


def test_the_wrong_layer(artifact: moegen.Artifact, packed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Another configuration, another processor's layout, another target; and a rebuilt artifact of the same layout."""

    def pretended(change: Callable[[dict[str, Any]], Any]) -> moegen.Module:
        """The artifact with a manifest that says something else."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(artifact.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        change(manifest)
        seal(folder, {name: value for name, value in manifest.items() if name != "manifest_sha256"})
        return moegen.load(folder)

    for change, said in (
        (lambda m: m["config"].update(top_k=1), "for another layer: top_k=2 instead of 1"),
        (lambda m: m["segments"][1].update(shape=[4, 24, 64, 2, 4]), "in another processor's layout, up float32 "),
    ):
        with pytest.raises(WeightsError, match=said):
            pretended(change).bind(packed)
    header = MoePack(packed).header
    other = dataclasses.replace(artifact, target=dataclasses.replace(artifact.target, kind="cuda"))
    other = dataclasses.replace(other, manifest={**artifact.manifest, "target": other.target.to_dict()})
    with pytest.raises(WeightsError, match="for target llvm, this layer is for cuda"):
        MoePack(packed).check_fits(other)
    pretended(lambda m: (m.update(key="0" * 64, created="later"), m.pop("layout"))).bind(packed)
    assert header.layout == artifact.manifest["layout"]
    for name in ("prefix", "layout", "gate_up", "checkpoint_format"):
        with pytest.raises(WeightsError, match=f"{name} is for checkpoints"):
            moegen.load(artifact.path).bind(packed, **{name: "x"})


def with_header(packed: pathlib.Path, out: pathlib.Path, text: bytes) -> None:
    """A file with another header whose checksum is right."""
    content = packed.read_bytes()
    prelude, start = bytearray(content[:PRELUDE_BYTES]), struct.unpack_from("<Q", content, 16)[0]
    offset = -(-(PRELUDE_BYTES + len(text)) // 4096) * 4096
    struct.pack_into("<IQ", prelude, 12, len(text), offset)
    prelude[120:152] = hashlib.sha256(text).digest()
    out.write_bytes((bytes(prelude) + text).ljust(offset, b"\0") + content[start:])


HOSTILE = st.sampled_from([None, True, -1, 0, 1, 2**63, 10**400, 0.5, float("nan"), "", "x", "a" * 64, [], [0], [[]], {}, {"a": 1}])


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_hostile_headers(packed: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Anything in place of anything, with the right checksum: it is refused, or is what can be verified."""
    content = packed.read_bytes()
    header = json.loads(content[PRELUDE_BYTES : PRELUDE_BYTES + struct.unpack_from("<I", content, 12)[0]])
    where = data.draw(st.sampled_from([(), *((name,) for name in header), *(("config", name) for name in header["config"])]))
    if not where or where == ("segments",):
        where = ("segments", data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([*header["segments"][0], "more"])))
    place = header
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = data.draw(HOSTILE)
    out = tmp_path_factory.getbasetemp() / "hostile.moepack"
    with_header(packed, out, json.dumps(header).encode())
    with contextlib.suppress(WeightsError):
        MoePack(out).verify()


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{", b"[]", b"3", b"[" * 100_000, b'{"config": 1}', b'{"segments": [3]}'])
def test_headers_that_are_none(packed: pathlib.Path, tmp_path: pathlib.Path, text: bytes) -> None:
    with_header(packed, tmp_path / "x", text)
    with pytest.raises(WeightsError, match="header is malformed"):
        MoePack(tmp_path / "x")


# ---------------------------------------------------------------- writing


def test_nothing_half(artifact: moegen.Artifact, weights: dict[str, np.ndarray], copy: pathlib.Path, monkeypatch: Any) -> None:
    """Ctrl-C, a bad weight or a full disk in the middle: the old file is there as it was, and nothing else."""
    before = copy.read_bytes()
    halved = {name: w / 2 for name, w in weights.items()}

    def interrupted(done: int) -> None:
        assert len(list(copy.parent.iterdir())) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(halved, copy, artifact, progress=interrupted)
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(WeightsError, match=r"No space left on device, it needs \d"):
        pack(halved, copy, artifact)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(WeightsError, match="File too large"):
            pack(halved, copy, artifact)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copy.read_bytes() == before
    assert list(copy.parent.iterdir()) == [copy]
    pack(halved, copy, artifact)
    assert copy.read_bytes() != before
    assert list(copy.parent.iterdir()) == [copy]


def test_leftovers_of_killed_processes_go(
    artifact: moegen.Artifact, weights: dict[str, np.ndarray], tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """What a living process writes stays."""
    kill = """
import os, sys
import numpy as np
import moegen, moegen.reference
from moegen.pack import pack
artifact = moegen.open_artifact(sys.argv[1])
weights = moegen.reference.random_weights(artifact.config, np.random.default_rng(0))
def progress(done):
    print("begun", flush=True)
    sys.stdin.read(1)
pack(weights, sys.argv[2], artifact, progress=progress)
"""
    command = [sys.executable, "-c", kill, str(artifact.path), str(tmp_path / "a.moepack")]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    monkeypatch.setattr("moegen.pack.writing._YOUNG_SECONDS", -1)
    pack(weights, tmp_path / "b.moepack", artifact)
    assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.communicate()
    pack(weights, tmp_path / "b.moepack", artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["b.moepack"]


PEAK = """
import pathlib, re, sys
import numpy as np
import moegen
from moegen.artifact import open_artifact
from moegen.pack import pack

def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

artifact = open_artifact(sys.argv[1])
pack(sys.argv[2], sys.argv[3], artifact, layer=0)  # whatever is imported is there now
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmHWM")
pack(sys.argv[2], sys.argv[3], artifact, layer=1)
print(megabytes("VmHWM") - before)
"""


def test_memory_stays_near_one_expert(artifact: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    """The artifact of a device's layout needs no library, so a manifest is enough for a layer of many experts."""
    from moegen.cuda_geometry import CudaGeometry

    config = moegen.MoEConfig(experts=32, top_k=2, hidden=512, intermediate=512, dtype="bfloat16")
    expert_mb = 3 * 512 * 512 * 2 / 2**20
    geometry = CudaGeometry(config)
    manifest = {**artifact.manifest, "config": config.to_dict(), "segments": geometry.describe()}
    manifest |= {"packed_bytes": geometry.packed_bytes, "target": {**artifact.manifest["target"], "kind": "cuda"}}
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("moe.so", "te_source.py"):
        (folder / name).write_text("")
    seal(folder, {name: value for name, value in manifest.items() if name not in ("manifest_sha256", "files")})
    tensors: dict[str, np.ndarray] = {}
    one = np.random.default_rng(0).standard_normal((512, 512), np.float32).astype(ml_dtypes.bfloat16)
    for layer in (0, 1):
        tensors[f"layers.{layer}.mlp.gate.weight"] = one[:32]
        for e in range(32):
            tensors |= {f"layers.{layer}.mlp.experts.{e}.{m}_proj.weight": one for m in ("gate", "up", "down")}
    save(tmp_path / "model.safetensors", tensors)
    done = run_python(PEAK, folder, tmp_path / "model.safetensors", tmp_path / "out.moepack")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6 * expert_mb < 32 * expert_mb / 4, "the expert as it is read, as it is packed, and 2 MB pages"


def test_reading_a_float_layer_from_python_alone(packed: pathlib.Path, artifact: moegen.Artifact, weights: dict[str, Any]) -> None:
    """The prelude as the README's C++ has it."""
    content = packed.read_bytes()
    magic, version, _, offset, size, hidden, experts, top_k, code, bits, lanes, device, zero = struct.unpack_from(
        "<8sIIQQIIIBBHII", content
    )
    assert (magic, version, device, zero) == (b"\x93MOEPACK", 1, 1, 0)
    assert (hidden, experts, top_k, code, bits, lanes) == (64, 4, 2, 2, 32, 1)
    assert content[56:120].decode() == artifact.manifest["layout"]
    assert offset % 4096 == 0
    assert offset + size == len(content)
    assert stored(weights["router.weight"], "float32").data[0, 0].tobytes() in content[offset:]
