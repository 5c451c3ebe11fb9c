"""Building: what decides a build, editing the emitted source, and the sentences of builds that fail."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TINY, check_against_reference, tokens

import moegen
from moegen import BuildError, ScheduleError, TargetError, VerificationError, artifact, builder, reference, sources, toolchain
from moegen import plan as planning
from moegen.batch import build_many
from moegen.config import DTYPES
from moegen.geometry import Geometry, Tiling
from moegen.plan import Plan, plan, plan_from_source
from moegen.target import host_arch

CONFIG = moegen.MoEConfig(**TINY)
# Few register tiles: a build of a second or two.
SMALL_TILING = Tiling(lanes=4, max_rows=1, chunk_rows=16, k_block=64)

OTHER_VALUES: dict[str, Any] = {
    "experts": 3,
    "top_k": 2,
    "hidden": 17,
    "intermediate": 17,
    "dtype": "float16",
    "activation": "silu",
    "gating": "sigmoid",
    "renormalize": False,
    "routed_scaling": 2.0,
    "router_bias": True,
    "correction_bias": True,
    "n_group": 2,
    "topk_group": 2,
    "group_score": "max",
    "weight_on_input": True,
    "expert_bias": True,
    "shared_intermediate": 8,
    "shared_gate": True,
    "capacity_factor": 1.0,
    "swiglu_alpha": 1.0,
    "swiglu_limit": 1.0,
    "balance_coefficient": 0.02,
    "weight_dtype": "int8",
    "weight_group": 32,
    "weight_zero_point": True,
    "scale_dtype": "float32",
    "activation_dtype": "int8",
}


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(CONFIG, tiling=SMALL_TILING)


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Builds stop before they compile; the plans that got so far."""
    seen: list[Plan] = []

    def fill(folder: pathlib.Path, todo: Plan, verify: bool, known: Any) -> None:
        seen.append(todo)
        raise BuildError("stopped here")

    monkeypatch.setattr(builder, "_fill", fill)
    return seen


# ---------------------------------------------------------------- plans


def test_a_plan_is_reproducible(small: Plan) -> None:
    again = plan(CONFIG, tiling=SMALL_TILING)
    assert (again.key, again.name, again.te_source) == (small.key, small.name, small.te_source)
    assert len(small.key) == 64
    assert small.name.startswith("moe-e2-k1-h16-i16-float32-softmax-relu-")
    assert small.name.endswith(small.key[:10])
    assert small.config == CONFIG


def test_the_key_knows_every_field_of_the_configuration() -> None:
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(moegen.MoEConfig)}
    base = moegen.MoEConfig(**TINY | {"experts": 4, "n_group": 2, "shared_intermediate": 4})
    needs = {"topk_group": {"n_group": 2}, "n_group": {"n_group": 4, "group_score": "max"}, "experts": {"experts": 6}}
    needs |= {name: {"weight_dtype": "int8"} for name in ("weight_group", "weight_zero_point", "activation_dtype")}
    keys = {plan(base).key}
    for name, value in OTHER_VALUES.items():
        other = dataclasses.replace(base, **({name: value} | needs.get(name, {})))
        assert other != base, name
        key = plan(other).key
        assert key not in keys, f"{name} does not change the key"
        keys.add(key)


def test_the_key_knows_everything_else(small: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    keys = [small.key]
    keys.append(plan(CONFIG).key)
    keys.append(plan(CONFIG, mcpu="x86-64-v3" if small.target.arch == "x86_64" else "generic", tiling=SMALL_TILING).key)
    for change in ({"max_rows": 2, "chunk_rows": 16}, {"chunk_rows": 17}, {"k_block": 96}):
        keys.append(plan(CONFIG, tiling=dataclasses.replace(SMALL_TILING, **change)).key)
    keys.append(dataclasses.replace(small, te_source=small.te_source + "\n# edited").key)
    keys.append(dataclasses.replace(small, target=dataclasses.replace(small.target, disabled=("avx2",))).key)
    stage, knobs = next((s, k) for s, k in small.knobs.items() if dataclasses.fields(k))
    field = dataclasses.fields(knobs)[0]
    changed = dataclasses.replace(knobs, **{field.name: getattr(knobs, field.name) + 1})
    keys.append(dataclasses.replace(small, knobs=small.knobs | {stage: changed}).key)
    with monkeypatch.context() as patch:
        patch.setattr(planning, "__version__", "0.0.0")
        keys.append(small.key)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "package_folder", lambda name: tmp_path / name)
        (tmp_path / "templates" / "llvm").mkdir(parents=True)
        (tmp_path / "templates" / "llvm" / "pool.h").write_text("// another pool")
        (tmp_path / "schedules").mkdir()
        keys.append(small.key)
        (tmp_path / "schedules" / "new.py").write_text("# another schedule")
        keys.append(small.key)
        (tmp_path / "schedules" / "new.pyc").write_text("compiled")
        assert small.key == keys[-1], "compiled Python is no source"
    assert len(set(keys)) == len(keys)
    assert small.key == keys[0]


def test_plans_are_what_is_built(small: Plan, no_compilation: list[Plan], tmp_path: pathlib.Path) -> None:
    for what in (CONFIG, small):
        with pytest.raises(BuildError, match="stopped here"):
            moegen.build(what, out=tmp_path)
    assert [todo.key for todo in no_compilation] == [plan(CONFIG).key, small.key]
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- editing the source


@pytest.fixture(scope="module")
def written(small: Plan, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The emitted source in a file of the user's."""
    path = tmp_path_factory.mktemp("source") / "my_layer.py"
    path.write_text(small.te_source, encoding="utf-8")
    return path


def _edited(source: pathlib.Path, target: pathlib.Path, *changes: tuple[str, str]) -> pathlib.Path:
    text = source.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    target.write_text(text, encoding="utf-8")
    return target


def test_emit_and_build_from(small: Plan, written: pathlib.Path, tmp_path: pathlib.Path, rng: np.random.Generator) -> None:
    """The unchanged text is the same plan; the artifact holds the text, its proof and the report."""
    todo = plan_from_source(written)
    assert todo.config == CONFIG
    assert todo.geometry == Geometry(CONFIG, SMALL_TILING)
    assert todo.key == small.key
    made = moegen.build(todo, out=tmp_path)
    assert (made.path / "te_source.py").read_text(encoding="utf-8") == small.te_source
    assert made.manifest["source_sha256"] == hashlib.sha256(small.te_source.encode()).hexdigest()
    assert made.manifest["verified"] == "passed"
    assert made.manifest["tiling"] == dataclasses.asdict(SMALL_TILING)
    assert made.verification()["status"] == "passed"
    assert not list(made.path.glob("**/__pycache__"))
    assert plan_from_source(made.path / "te_source.py").key == small.key
    weights = reference.random_weights(CONFIG, rng)
    layer = moegen.load(made.path, threads=2).bind(weights)
    for count in (0, 1, 2, 17, 300):
        check_against_reference(layer, weights, tokens(CONFIG, count, rng))


RELU = "tirx.Select(x < f32(0.0), f32(0.0), x)"


def test_an_edit_that_keeps_the_meaning(small: Plan, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    edited = _edited(written, tmp_path / "edited.py", (RELU, "tirx.Select(x > f32(0.0), x, f32(0.0))  # mine"))
    todo = plan_from_source(edited)
    assert todo.key != small.key
    made = moegen.build(todo, out=tmp_path / "store")
    assert made.manifest["verified"] == "passed"
    assert "# mine" in (made.path / "te_source.py").read_text(encoding="utf-8")
    assert moegen.build(todo, out=tmp_path / "store").path == made.path
    plain = moegen.build(small, out=tmp_path / "store", verify=False)
    checks = [b"Mismatched type on argument" in (one.path / artifact.LIBRARY).read_bytes() for one in (made, plain)]
    assert checks == [True, False], "stages of an edited module check what the host gives them"


def test_an_edit_that_changes_the_meaning(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The proof notices, and nothing of the build stays behind; `verify=False` is the user's own risk, and on record."""
    wrong = _edited(written, tmp_path / "wrong.py", (RELU, "te.max(x, f32(0.001))"))
    store = tmp_path / "store"
    with pytest.raises(VerificationError, match=r"the compiled module is wrong and was thrown away: .*error .* is above") as caught:
        moegen.build(plan_from_source(wrong), out=store)
    assert "\n" not in str(caught.value)
    assert os.listdir(store) == []
    made = moegen.build(plan_from_source(wrong), out=store, verify=False)
    assert made.manifest["verified"] == "skipped"
    report = moegen.verify(made)
    assert report["status"] == "failed"
    assert report["failures"]
    assert report["worst_relative_l2"] > report["bounds"]["relative_l2"]


FINE = "CONFIG = {'experts': 2, 'top_k': 1, 'hidden': 16}\n"
TILED = "TILING = {'lanes': %s, 'max_rows': %s, 'chunk_rows': 16, 'k_block': 64}"

BAD_SOURCES: dict[str, tuple[str, str]] = {
    "empty": ("", "CONFIG or TILING is missing"),
    "syntax": ("CONFIG = {\n", "is not a valid TE module"),
    "null byte": ("CONFIG = 1\0", "is not a valid TE module"),
    "no configuration": ("TILING = {}", "CONFIG or TILING is missing.*CONFIG"),
    "no tiling": (FINE, "CONFIG or TILING is missing.*TILING"),
    "computed": ("CONFIG = dict(experts=2)\nTILING = {}", "is not a valid TE module"),
    "a list": ("CONFIG = []\nTILING = {}", "te_source.py"),
    "a number": ("CONFIG = 3\nTILING = {}", "te_source.py"),
    "unknown field": (FINE.replace("}", ", 'depth': 2}") + TILED % (4, 1), "unknown configuration field 'depth'"),
    "impossible": (FINE.replace("1,", "3,") + TILED % (4, 1), "top_k=3 must be between 1 and 2"),
    "wrong type": (FINE.replace("2,", "'two',") + TILED % (4, 1), "experts='two' must be of type int"),
    "incomplete tiling": (FINE + "TILING = {'lanes': 4}", "CONFIG or TILING is missing or incomplete"),
    "unknown tiling": (FINE + "TILING = {'lane': 4}", "TILING"),
    "tiling of text": (FINE + TILED % ("'4'", 1), "te_source.py|lanes"),
    "text for rows": (FINE + TILED % (4, "'1'"), "te_source.py|max_rows"),
    "tiling of fractions": (FINE + TILED % (4, 1.5), "te_source.py|max_rows"),
    "deep": ("CONFIG = " + "(" * 5000 + ")" * 5000, "te_source.py"),
    "deeper": ("CONFIG = " + "-" * 50000 + "1", "te_source.py"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_sources_that_are_none(kind: str, tmp_path: pathlib.Path) -> None:
    text, message = BAD_SOURCES[kind]
    path = tmp_path / "te_source.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((BuildError, ScheduleError), match=message) as caught:
        plan_from_source(path)
    assert "\n" not in str(caught.value)


def test_sources_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"CONFIG = '\xe9'")
    for path in (tmp_path / "none.py", tmp_path, tmp_path / "latin.py"):
        with pytest.raises(BuildError, match=r"cannot be read"):
            plan_from_source(path)


BROKEN_BODIES: dict[str, tuple[tuple[str, str], str]] = {
    "raises": (("\ndef i64(", "\n1 / 0\n\ndef i64("), r"te_source.py fails when executed: ZeroDivisionError: division by zero"),
    "exits": (("\ndef i64(", "\nraise SystemExit(3)\n\ndef i64("), r"te_source.py fails when executed: SystemExit"),
    "imports what is not there": (
        ("from tvm import te, tirx", "from tvm import te, tirx\nimport nowhere"),
        "No module named 'nowhere'",
    ),
    "no stages": (("def stages(", "def stadia("), "stages"),
    "stages fails": (('    yield "topk", topk()', "    raise KeyError('mine')"), r"stages\(\) fails: KeyError: 'mine'"),
    "a stage is missing": (('    yield "finish", finish()', ""), "finish"),
    "an unknown stage": (('    yield "finish", finish()', '    yield "finish", finish()\n    yield "mine", finish()'), "mine"),
    "tile loop cut short": (("range(1, 2)", "range(1, 1)"), "router"),
    "not tensors": (('yield "finish", finish()', 'yield "finish", [1, 2]'), "fails|finish"),
}


@pytest.mark.parametrize("kind", BROKEN_BODIES)
def test_sources_that_do_not_build(kind: str, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    change, message = BROKEN_BODIES[kind]
    todo = plan_from_source(_edited(written, tmp_path / "broken.py", change))
    with pytest.raises(moegen.MoegenError, match=message) as caught:
        moegen.build(todo, out=tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "store") == []


# ---------------------------------------------------------------- targets, tilings, tools


@pytest.mark.parametrize("mcpu", ["nonsense", "x86-64-v9", "znver5 -mattr=+x", "", " "])
def test_unknown_processors(mcpu: str) -> None:
    if mcpu == "":
        assert plan(CONFIG, mcpu=mcpu).target == plan(CONFIG).target
        return
    with pytest.raises(TargetError, match="is not a processor that LLVM knows for") as caught:
        plan(CONFIG, mcpu=mcpu)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["", "aarch64 ", "vax"])
def test_unknown_architectures(arch: str) -> None:
    with pytest.raises(TargetError, match=r"must be one of (x86_64, aarch64|aarch64, x86_64)"):
        plan(CONFIG, arch=arch)


OTHER_ARCH = {"x86_64": "aarch64"}.get(host_arch(), "x86_64")


def test_another_architecture_needs_its_compiler(tmp_path: pathlib.Path) -> None:
    todo = plan(CONFIG, tiling=dataclasses.replace(SMALL_TILING, lanes=4, pair=1), arch=OTHER_ARCH)
    assert todo.target.arch == OTHER_ARCH
    assert todo.target.disabled == ()
    said = f"building for {OTHER_ARCH} needs a C++ compiler for it: set CXX, for example to {OTHER_ARCH}-linux-gnu-g++"
    with pytest.raises(BuildError, match=f"^{re.escape(said)}$"):
        moegen.build(todo, out=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(shutil.which(f"{OTHER_ARCH}-linux-gnu-g++") is None, reason=f"no compiler for {OTHER_ARCH}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_building_for_another_architecture(dtype: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the proof, which this machine cannot run."""
    monkeypatch.setenv("CXX", f"{OTHER_ARCH}-linux-gnu-g++")
    made = moegen.build(dataclasses.replace(CONFIG, dtype=dtype), out=tmp_path, arch=OTHER_ARCH)
    assert made.verification()["status"] == "skipped"
    assert f"was compiled for {OTHER_ARCH}; this machine is {host_arch()}" in made.verification()["reason"]
    machine = (made.path / "moe.so").read_bytes()[18:20]  # e_machine of the ELF header
    assert int.from_bytes(machine, "little") == {"aarch64": 183, "x86_64": 62}[OTHER_ARCH]
    assert b"libtvm_ffi.so\0" in (made.path / "moe.so").read_bytes()
    with pytest.raises(moegen.ArtifactError, match="was compiled for"):
        moegen.load(made.path)


@pytest.mark.parametrize("target", ["vulkan", "", "LLVM"])
def test_unknown_targets(target: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(TargetError, match="must be one of llvm"):
        moegen.build(CONFIG, target=target, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 5}, "lanes=5 must be 4, 8 or 16"),
        ({"lanes": 0}, "lanes=0 must be"),
        ({"lanes": 32}, "lanes=32 must be"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_rows": 99, "chunk_rows": 200}, r"max_rows=99 needs \d+ vector registers"),
        ({"max_rows": 3, "chunk_rows": 2}, "chunk_rows=2 must be at least max_rows=3"),
        ({"k_block": 32}, "k_block=32 must be at least 64"),
    ],
)
def test_illegal_tilings(change: dict[str, int], message: str, small: Plan, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tiling = dataclasses.replace(SMALL_TILING, **change)
    with pytest.raises(ScheduleError, match=message):
        plan(CONFIG, tiling=tiling)
    text = next(line for line in small.te_source.splitlines() if line.startswith("TILING"))
    edited = _edited(written, tmp_path / "edited.py", (text, f"TILING = {dataclasses.asdict(tiling)!r}"))
    with pytest.raises(ScheduleError, match=message):
        plan_from_source(edited)


def test_lanes_that_the_processor_lacks() -> None:
    with pytest.raises(ScheduleError, match="lanes=16 must be 4, 8 or 16 and at most the 8 of llvm -mcpu=x86-64-v3"):
        plan(CONFIG, mcpu="x86-64-v3", tiling=dataclasses.replace(SMALL_TILING, lanes=16))


def test_no_compiler(small: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler.*install g\+\+ or clang\+\+ \(or set CXX\)"):
        moegen.build(small, out=tmp_path / "store")
    assert os.listdir(tmp_path / "store") == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'host.cc:1: error: no luck' >&2; exit 1", "compiling the generated host failed: host.cc:1: error: no luck"),
        ("exit 3", "compiling the generated host failed: no output"),
        (
            'case "$*" in *-shared*) echo "ld: error: no space" >&2; exit 1;; *) exec {real} "$@";; esac',
            "linking the library failed: ld: error: no space",
        ),
        (  # as GNU's say it
            "case \"$*\" in *-shared*) echo 'ld: final link failed: No space left on device' >&2; "
            "echo 'collect2: error: ld returned 1 exit status' >&2; exit 1;; *) exec {real} \"$@\";; esac",
            "linking the library failed: ld: final link failed: No space left on device",
        ),
    ],
)
def test_a_compiler_that_fails(
    script: str, message: str, small: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake-c++"
    fake.write_text("#!/bin/sh\n" + script.replace("{real}", toolchain.cxx()[0]) + "\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildError, match=message) as caught:
        moegen.build(small, out=tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "store") == []


def test_cxx_may_carry_arguments(small: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toolchain.cxx()[0]
    monkeypatch.setenv("CXX", f"{real} -g0 -pipe")
    assert toolchain.cxx() == [real, "-g0", "-pipe"]
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert toolchain.cxx()[0] == real, "a CXX that is not there is passed over"


def test_code_for_a_processor_that_is_not_this_one(small: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built, but its proof is skipped, and recorded as skipped."""
    monkeypatch.setattr(artifact, "missing_features", lambda target: ["avx1024"])
    made = moegen.build(small, out=tmp_path)
    assert made.manifest["verified"] == "skipped"
    report = made.verification()
    assert report["status"] == "skipped"
    assert "this processor lacks avx1024" in report["reason"]
    with pytest.raises(moegen.ArtifactError, match="avx1024"):
        moegen.load(made.path)


def test_names_with_spaces_and_umlauts(small: Plan, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with an awkward name, given relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    made = moegen.build(small, out="a store, mit Umläuten 'and' \"quotes\"", verify=True)
    assert made.manifest["verified"] == "passed"
    assert moegen.load(made.path).config == CONFIG


# ---------------------------------------------------------------- many


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_build_many(jobs: int, small: Plan, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Every outcome comes, errors as outcomes: one builds, one is wrong, one is broken, one is there already."""
    wrong = plan_from_source(_edited(written, tmp_path / "wrong.py", (RELU, "te.max(x, f32(0.5))")))
    broken = plan_from_source(_edited(written, tmp_path / "broken.py", ("\ndef i64(", "\n1 / 0\n\ndef i64(")))
    store = tmp_path / "store"
    outcomes = list(build_many([small, wrong, broken], out=store, jobs=jobs))
    assert len(outcomes) == 3
    assert all(o.config == CONFIG and o.seconds >= 0 and (o.artifact is None) == (o.error is not None) for o in outcomes)
    made = [o.artifact for o in outcomes if o.artifact is not None]
    assert [one.name for one in made] == [small.name]
    assert {type(o.error) for o in outcomes if o.error} == {VerificationError, BuildError}
    assert any("ZeroDivisionError" in str(o.error) for o in outcomes)
    assert os.listdir(store) == [small.name]
    again = list(build_many([small], out=store, jobs=jobs))
    assert again[0].artifact is not None
    assert again[0].artifact.manifest["created"] == made[0].manifest["created"]


def test_build_many_of_nothing(tmp_path: pathlib.Path) -> None:
    assert list(build_many([], out=tmp_path)) == []


def test_build_many_reports_bad_targets(tmp_path: pathlib.Path) -> None:
    outcomes = list(build_many([CONFIG, CONFIG], out=tmp_path, mcpu="nonsense", jobs=1))
    assert [type(o.error) for o in outcomes] == [TargetError, TargetError]


def test_build_many_can_be_left_early(small: Plan, tmp_path: pathlib.Path, no_compilation: list[Plan]) -> None:
    outcomes = build_many([small, small], out=tmp_path, jobs=1)
    first = next(outcomes)
    assert isinstance(first.error, BuildError)
    outcomes.close()  # type: ignore[attr-defined]
    assert len(no_compilation) == 1


def test_the_extra_is_named_when_the_compiler_is_missing(run: Callable[[str, str], str]) -> None:
    sentence = "BuildError: building needs the compiler ({} is not installed): pip install 'moegen[build]'"
    for package in ("tvm", "jinja2"):
        assert run(package, "moegen.build") == sentence.format(package)


@pytest.fixture
def run() -> Callable[[str, str], str]:
    """What using a name gives where a package is not installed."""
    from helpers import run_python

    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import moegen
try:
    eval(sys.argv[2])
except moegen.MoegenError as error:
    print(f"{type(error).__name__}: {error}")
"""

    def attempt(package: str, expression: str) -> str:
        done = run_python(code, package, expression)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return attempt
