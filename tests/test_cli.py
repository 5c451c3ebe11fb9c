"""The command line: what it prints, how it ends, and that no failure shows a traceback."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import environment

import moegen
from moegen import batch, builder, cli, display, options, plan, presets, verification
from moegen.batch import Outcome

COMMANDS = ("build", "emit", "list", "inspect", "verify", "bench", "pack", "report", "serve-bench", "validate")
TINY = {"experts": 4, "top_k": 2, "hidden": 32, "intermediate": 32}
OPTIONS = ("--experts", "4", "--top-k", "2", "--hidden", "32", "--intermediate", "32")
CONFIG = moegen.MoEConfig(**TINY)

Build = Callable[..., moegen.Artifact]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def sentence(*arguments: object, code: int = 1) -> str:
    """Runs a command that has to fail with nothing but one sentence on stderr; returns it."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    said = re.fullmatch(r"(?:Usage: .*\nTry .*\n\n)?Error: (.+)\n", result.stderr)
    assert said, result.stderr
    return said[1]


@pytest.fixture
def tiny(built: Build) -> moegen.Artifact:
    return built(**TINY)


@pytest.fixture
def damaged(tiny: moegen.Artifact, tmp_path: pathlib.Path) -> pathlib.Path:
    """A store with one good artifact, one with a truncated library, and one without a readable manifest."""
    store = tmp_path / "store"
    for name in ("good", "truncated", "unreadable"):
        shutil.copytree(tiny.path, store / name)
    with (store / "truncated" / "moe.so").open("r+b") as file:
        file.truncate(100)
    (store / "unreadable" / "manifest.json").write_text("{")
    return store


def outcome(error: moegen.MoegenError | None = None, artifact: moegen.Artifact | None = None) -> Outcome:
    return Outcome(CONFIG, artifact, error, 0.1)


# ---------------------------------------------------------------- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    text = run(command, "--help").output
    assert re.search(rf"Examples?:\n +moegen {command}", text)
    assert run(command, "-h").output == text


def test_group_help_and_version() -> None:
    text = run("--help").output
    assert all(re.search(rf"^  {command} ", text, re.MULTILINE) for command in COMMANDS)
    assert moegen.__version__ in run("--version").output


@pytest.mark.parametrize("command", ["build", "emit"])
def test_every_field_has_an_option_and_help(command: str) -> None:
    params = {param.name: param for param in cli.main.commands[command].params}
    for field in dataclasses.fields(moegen.MoEConfig):
        assert params[field.name].help, field.name  # type: ignore[attr-defined]
        assert f"--{field.name.replace('_', '-')}" in params[field.name].opts


def test_a_layer_by_its_experts_alone() -> None:
    assert "'hidden': 512" in run("emit", "--experts", "4", "--top-k", "2").output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["build"], 2, r"Missing --experts, --top-k \(or --model, or --preset\)"),
        (["build", "--experts", "4,x"], 2, "'4,x' is not a whole number"),
        (["build", *OPTIONS, "--dtype", "int4"], 2, "'int4' is not one of 'float32', 'bfloat16', 'float16'"),
        (["build", *OPTIONS, "--capacity-factor", "much"], 2, "'much' is not a valid float"),
        (["build", *OPTIONS, "--jobs", "0"], 2, "--jobs"),
        (["build", *OPTIONS, "--from", "te_source.py"], 2, "--from takes the layer from the file"),
        (["emit", "--experts", "4,8", "--top-k", "2", "--hidden", "32"], 2, "emit prints one layer"),
        (["build", *OPTIONS, "--top-k", "5"], 1, r"top_k=5 must be between 1 and 4 \(the number of experts\)"),
        (["build", *OPTIONS, "--top-k", "5,6"], 1, "none of 2 combinations is legal; top_k=5: top_k=5 must be between 1 and 4"),
        (["emit", *OPTIONS, "--n-group", "3"], 1, "n_group=3 must divide experts=4"),
        (["emit", *OPTIONS, "--host", "--asm", "topk"], 2, "--host and --asm exclude each other"),
        (
            ["emit", *OPTIONS, "--asm", "top"],
            1,
            "there is no stage 'top'; this layer has gather, topk, .*, expert_up_1 to expert_up_",
        ),
        (["emit", *OPTIONS, "--asm", ""], 1, "there is no stage ''; this layer has gather, topk"),
        (["emit", *OPTIONS, "--arch", "pdp11"], 1, "arch='pdp11' must be one of x86_64, aarch64"),
        (["emit", *OPTIONS, "--arch", "aarch64", "--mcpu", "znver5"], 1, "'znver5' is not a processor that LLVM knows for aarch64"),
        (["build", *OPTIONS, "--target", "cuda", "--arch", "sm_35"], 1, "too old"),
        (["build", *OPTIONS, "--mcpu", "pentium-nine"], 1, "'pentium-nine' is not a processor that LLVM knows"),
        (["build", "--model", "nowhere.json"], 1, "cannot read the configuration 'nowhere.json'"),
        (["build", "--from", "nowhere.py"], 1, "'nowhere.py' cannot be read: No such file"),
        (["emit", *OPTIONS, "-o", "/nowhere/te.py"], 1, "/nowhere/te.py: No such file or directory"),
        (["inspect", "nothing"], 1, "there is no artifact 'nothing'"),
        (["inspect", ""], 1, "there is no artifact ''"),
        (["verify", "/nowhere"], 1, "there is no artifact '/nowhere'"),
        (["verify", "nothing", "--seed", "-1"], 2, "--seed"),
    ],
)
def test_wrong_values_give_one_sentence(arguments: list[str], code: int, said: str) -> None:
    assert re.search(said, sentence(*arguments, code=code))


# ---------------------------------------------------------------- combinations


def test_combinations() -> None:
    found = options.combinations({"experts": (2, 4), "top_k": (1, 4), "hidden": (32,), "dtype": "float16"})
    assert [c.fields for c in found if c.config is None] == [{"experts": 2, "top_k": 4}]
    legal = [c.config for c in found if c.config]
    assert [(c.experts, c.top_k) for c in legal] == [(2, 1), (4, 1), (4, 4)]
    assert {(c.hidden, c.dtype) for c in legal} == {(32, "float16")}


def test_combinations_that_are_the_same_layer_are_built_once() -> None:
    assert len(options.combinations({"experts": 4, "top_k": 1, "hidden": 32, "intermediate": (0, 128)})) == 1


# ---------------------------------------------------------------- build


def test_build_says_what_is_already_built(tiny: moegen.Artifact) -> None:
    line = run("build", *OPTIONS, "--out", tiny.path.parent).stdout
    error = f"{tiny.verification()['worst_relative_l2']:.1e}"
    assert line == f"{tiny.name}: already built, verified (worst relative L2 error {error}): {tiny.path}\n"


@pytest.mark.slow
def test_build_of_several(tiny: moegen.Artifact) -> None:
    sizes = ["--experts", "2,4", "--top-k", "2,3", "--hidden", "32", "--intermediate", "32"]
    result = run("build", *sizes, "--out", tiny.path.parent, "--jobs", "2")
    assert "skipped experts=2 top_k=3: top_k=3 must be between 1 and 2" in result.stderr
    *lines, summary = result.stdout.splitlines()
    assert len(lines) == 3
    assert sum(": already built, verified" in line for line in lines) == 1
    assert sum(bool(re.search(r": built in [\d.]+ s, verified", line)) for line in lines) == 2
    assert summary == "2 built, 1 already built, 1 skipped as illegal"
    again = json.loads(run("build", *sizes, "--out", tiny.path.parent, "--json").stdout)
    assert all(r["already_built"] and r["verified"] == "passed" for r in again["results"])
    assert again["skipped"] == [{"fields": {"experts": 2, "top_k": 3}, "reason": again["skipped"][0]["reason"]}]


def test_build_from_a_model(tiny: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    fields = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    given = ["--model", tmp_path, "--experts", "4", "--dtype", "float32"]
    (result,) = json.loads(run("build", *given, "--out", tiny.path.parent, "--json").stdout)["results"]
    assert result["name"] == tiny.name
    assert result["already_built"]


def test_presets(monkeypatch: pytest.MonkeyPatch, tiny: moegen.Artifact) -> None:
    monkeypatch.setitem(presets.PRESETS, "toy", moegen.MoEConfig(**TINY | {"experts": 8, "dtype": "bfloat16"}))
    given = ["--preset", "toy", "--experts", "4", "--dtype", "float32"]
    (result,) = json.loads(run("build", *given, "--out", tiny.path.parent, "--json").stdout)["results"]
    assert result["name"] == tiny.name
    assert run("emit", *given).stdout == run("emit", *OPTIONS).stdout
    assert "did you mean 'toy'?" in sentence("build", "--preset", "toi")
    assert "give one of them" in sentence("emit", "--preset", "toy", "--model", "config.json", code=2)
    assert "leave out --model, --preset" in sentence("build", "--preset", "toy", "--from", "te.py", code=2)


def test_build_from_emitted_text(tiny: moegen.Artifact, tmp_path: pathlib.Path) -> None:
    run("emit", *OPTIONS, "-o", tmp_path / "te.py")
    assert run("build", "--from", tmp_path / "te.py", "--out", tiny.path.parent).stdout.startswith(f"{tiny.name}: already built")


def test_build_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: dict[str, Any] = {}

    def build_many(configs: Any, target: str, out: str, **settings: Any) -> Iterator[Outcome]:
        seen.update(settings, configs=list(configs), target=target, out=out)
        yield from ()

    monkeypatch.setattr(batch, "build_many", build_many)
    extra = ["--gating", "sigmoid", "--no-renormalize", "--correction-bias", "--capacity-factor", "1.5", "--routed-scaling", "2.5"]
    run("build", *OPTIONS, *extra, "--mcpu", "x86-64-v3", "--out", tmp_path, "--jobs", "3", "--force", "--no-verify")
    special = {"gating": "sigmoid", "renormalize": False, "correction_bias": True, "capacity_factor": 1.5, "routed_scaling": 2.5}
    assert seen == {
        "configs": [moegen.MoEConfig(**TINY, **special)],
        "target": "llvm",
        "out": str(tmp_path),
        "mcpu": "x86-64-v3",
        "arch": None,
        "verify": False,
        "force": True,
        "tuning": True,
        "tf32": False,
        "jobs": 3,
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_failed_builds(monkeypatch: pytest.MonkeyPatch, tiny: moegen.Artifact, as_json: bool) -> None:
    made = [outcome(artifact=tiny), outcome(error=moegen.BuildError("the linker\nis on strike"))]
    monkeypatch.setattr(batch, "build_many", lambda *_, **__: iter(made))
    options = ["--json"] if as_json else []
    result = run("build", *OPTIONS, "--top-k", "1,2", "--out", tiny.path.parent, *options, code=1)
    if as_json:
        assert [r.get("error") for r in json.loads(result.stdout)["results"]] == [None, "the linker is on strike"]
    else:
        assert result.stderr == "Error: E4 K2 H32 I32 float32 softmax swiglu: the linker is on strike\n"
        assert result.stdout.endswith("0 built, 1 already built, 1 failed\n")


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    two = [outcome(moegen.BuildError("no")), outcome(moegen.BuildError("no"))]
    assert list(cli._outcomes(iter(two), 2)) == two
    assert "building" in terminal.getvalue()


def test_processors_can_be_listed() -> None:
    names = run("build", "--mcpu", "help").stdout.split()
    assert len(names) > 10
    assert run("emit", "--mcpu", "help").stdout.split() == names
    assert {"generic", "neoverse-v2"} <= set(run("emit", "--arch", "aarch64", "--mcpu", "help").stdout.split())


# ---------------------------------------------------------------- emit


def test_emit_prints_what_is_built(tmp_path: pathlib.Path, tiny: moegen.Artifact) -> None:
    text = run("emit", *OPTIONS).stdout
    assert text == plan.plan(CONFIG).te_source
    assert text == (tiny.path / "te_source.py").read_text()
    assert run("emit", *OPTIONS, "-o", tmp_path / "te.py").stdout == ""
    assert (tmp_path / "te.py").read_text() == text


def test_emit_assembly(tmp_path: pathlib.Path) -> None:
    text = run("emit", *OPTIONS, "--asm", "expert_up_4").stdout
    assert "__tvm_ffi_expert_up_4:" in text
    assert "__tvm_ffi_expert_up_3:" not in text
    assert run("emit", *OPTIONS, "--asm", "expert_up_4", "-o", tmp_path / "up.s").stdout == ""
    assert (tmp_path / "up.s").read_text() == text
    arm = run("emit", *OPTIONS, "--arch", "aarch64", "--asm", "expert_up_8").stdout
    assert "fmla\t" in arm
    assert "prfm\t" in arm
    x86 = run("emit", *OPTIONS, "--arch", "x86_64", "--mcpu", "x86-64-v3", "--asm", "expert_down_6").stdout
    assert "vfmadd231ps" in x86
    assert "%ymm" in x86
    assert "%zmm" not in x86


def test_emit_for_another_architecture() -> None:
    assert "emitted by moegen" in (text := run("emit", *OPTIONS, "--arch", "aarch64", "--mcpu", "neoverse-v2").stdout)
    assert "for llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-v2" in text
    assert "'lanes': 4, 'max_rows': 8" in text


def test_emit_host() -> None:
    text = run("emit", *OPTIONS, "--host").stdout
    assert text.startswith("// E=4 K=2 H=32 I=32 float32 softmax swiglu")
    assert "__tvm_ffi_topk" in text


# ---------------------------------------------------------------- list


def test_list(damaged: pathlib.Path) -> None:
    lines = run("list", "--out", damaged).stdout.splitlines()
    assert lines[0].split() == ["name", "layer", "target", "verified", "size"]
    assert re.fullmatch(r"good +E4 K2 H32 I32 float32 softmax swiglu +\S+ +passed +\S+ kB", lines[1])
    assert lines[2].startswith("damaged: truncated/moe.so has 100 bytes instead of")
    assert lines[3].startswith("damaged: unreadable/manifest.json is damaged")
    assert len(lines) == 4


def test_list_json(damaged: pathlib.Path) -> None:
    good, *bad = json.loads(run("list", "--out", damaged, "--json").stdout)
    assert moegen.MoEConfig.from_dict(good["config"]) == CONFIG
    assert good["runs_here"] is True
    assert good["path"] == str(damaged / "good")
    assert [list(row) for row in bad] == [["error"], ["error"]]


def test_list_of_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGEN_STORE", str(tmp_path / "nothing"))
    assert "has no artifacts" in run("list").stdout
    assert json.loads(run("list", "--json").stdout) == []


def test_brief_names_what_is_unusual() -> None:
    config = moegen.MoEConfig(
        experts=8, top_k=2, hidden=64, gating="sigmoid", correction_bias=True, routed_scaling=2.5, renormalize=False
    )
    assert display.brief(config) == "E8 K2 H64 I256 float32 sigmoid swiglu renormalize=False routed_scaling=2.5 correction_bias"


# ---------------------------------------------------------------- inspect


def test_inspect(damaged: pathlib.Path, tiny: moegen.Artifact) -> None:
    text = run("inspect", damaged / "good").stdout
    assert text.startswith("good\n")
    for part in (
        "E4 K2 H32 I32 float32 softmax swiglu",
        f"-mcpu={tiny.target.mcpu}",
        " ".join(tiny.target.features),
        "runs here yes",
        "verified (worst relative L2 error",
        f"seed {tiny.verification()['seed']}",
        "renormalize = True",
        "moe_forward(x float32 [T, 32]",
        "tiling: lanes=",
        f"apache-tvm={tiny.manifest['versions']['apache-tvm']}",
        tiny.manifest["files"]["moe.so"]["sha256"],
        *(segment["name"] for segment in tiny.manifest["segments"]),
    ):
        assert part in text
    assert run("inspect", "good", "--out", damaged).stdout == text
    assert run("inspect", "go", "--out", damaged).stdout == text


def test_inspect_raw(tiny: moegen.Artifact) -> None:
    assert run("inspect", tiny.path, "--te-source").stdout == (tiny.path / "te_source.py").read_text()
    assert run("inspect", tiny.path, "--manifest").stdout == (tiny.path / "manifest.json").read_text()
    said = json.loads(run("inspect", tiny.path, "--json").stdout)
    assert said["config"] == CONFIG.to_dict()
    assert said["verification"] == tiny.verification()
    assert said["runs_here"] is True


def test_inspect_of_another_machines_artifact(tiny: moegen.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiny.target.features:
        pytest.skip("this target needs no features")
    monkeypatch.setattr("moegen.target.host_cpu_flags", frozenset)
    assert f"runs here no, missing: {tiny.target.features[0]}" in run("inspect", tiny.path).stdout
    assert "this processor lacks" in sentence("verify", tiny.path)


def test_names_have_to_be_unique(damaged: pathlib.Path, tiny: moegen.Artifact) -> None:
    shutil.copytree(tiny.path, damaged / "goose")
    assert "several artifacts" in sentence("inspect", "goo", "--out", damaged)
    assert run("inspect", "good", "--out", damaged).stdout.startswith("good\n")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damaged_artifacts_are_refused(command: str, damaged: pathlib.Path) -> None:
    assert sentence(command, damaged / "truncated").startswith("truncated/moe.so has 100 bytes")
    assert sentence(command, "unreadable", "--out", damaged).startswith("unreadable/manifest.json is damaged")


# ---------------------------------------------------------------- verify


def test_verify(tiny: moegen.Artifact) -> None:
    text = run("verify", tiny.path, "--seed", "7").stdout
    assert re.search(r"^all_to_one +300 +\d\.\de-\d\d +\d\.\de-\d\d +\d+$", text, re.MULTILINE)
    assert "seed 7" in text
    assert f"{tiny.name}: passed in" in text


def test_verify_json(tiny: moegen.Artifact) -> None:
    reports = [json.loads(run("verify", tiny.path, "--seed", "7", "--json").stdout) for _ in range(2)]
    assert reports[0]["status"] == "passed"
    assert reports[0]["seed"] == 7
    assert reports[0]["cases"] == reports[1]["cases"]


def test_failed_verification(tiny: moegen.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_errors", lambda *_: (float("inf"), float("inf")))
    text = run("verify", tiny.path, code=1).stdout
    assert "FAILED: uniform routing, T=1: relative L2 error inf is above 3e-06" in text
    assert f"{tiny.name}: failed in" in text
    assert json.loads(run("verify", tiny.path, "--json", code=1).stdout)["worst_relative_l2"] is None


# ---------------------------------------------------------------- what the world does


def test_store_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        assert sentence("build", *OPTIONS, "--out", store).startswith(f"cannot write to '{store}'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_store(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in sentence("build", *OPTIONS, "--out", tmp_path)


def test_store_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/store")

    monkeypatch.setattr("moegen.artifact.list_artifacts", refuse)
    assert sentence("list") == "/store: Permission denied"


def test_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builder, "_fill", fill)
    assert "No space left on device" in sentence("build", *OPTIONS, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unexpected_errors_are_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("stage")

    monkeypatch.setattr(batch, "build_many", fail)
    assert sentence("build", *OPTIONS).startswith("unexpected KeyError: 'stage'")
    monkeypatch.setenv("MOEGEN_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(cli.main, ["build", *OPTIONS]).exception, KeyError)


def _start(*arguments: object, code: str = "import moegen.cli; moegen.cli.main()") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_without_the_compiler() -> None:
    code = "import sys; sys.modules['tvm'] = None; import moegen.cli; moegen.cli.main()"
    with _start("build", *OPTIONS, code=code) as process:
        assert process.communicate()[1] == (
            "Error: building needs the compiler (tvm is not installed): pip install 'moegen[build]'\n"
        )
    assert process.returncode == 1


def test_broken_pipe(tiny: moegen.Artifact) -> None:
    process = _start("inspect", tiny.path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert said == ""


def test_interrupt_that_the_compiler_swallows(monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RuntimeError from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(batch, "build_many", swallow)
    assert run("build", *OPTIONS, code=130).stderr == "Interrupted.\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False], ids=["terminal", "kill"])
def test_interrupt_leaves_nothing_behind(tmp_path: pathlib.Path, everyone: bool) -> None:
    """A terminal sends Ctrl-C to the whole process group, `kill` to one process."""
    process = _start("build", "--experts", "4", "--top-k", "1,2,3,4", "--hidden", "32", "--jobs", "2", "--out", tmp_path)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".building-*/work/host.cc")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ("", "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []
