"""The benchmark: what it refuses to quote, what it survives, what it writes. No test here depends on how fast anything is."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
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
from moegen import bench, cli, presets
from moegen.arrays import HostArray
from moegen.bench import Effort, Request, Subject, Watch, measure, printing, results
from moegen.bench import run as running
from moegen.bench.ceilings import BF16_DOT, FMA, Ceilings, Probe
from moegen.bench.contenders import roster
from moegen.bench.contenders.roster import FamilyInfo
from moegen.errors import BuildError, ConfigError, MeasureError
from moegen.machine import available_bytes, this_machine
from moegen.target import host_cpu_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {"experts": 4, "top_k": 2, "hidden": 32, "intermediate": 32}
CONFIG = moegen.MoEConfig(**TINY)
QUICK = Effort(rounds=2, min_ms=0.1, patience_seconds=10)
RIVALS = ("honest", "liar", "lazy", "crasher", "hanger", "raiser", "late", "last", "refuser")

Build = Callable[..., moegen.Artifact]


class Quiet(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.turns = 0

    def step(self, what: str, turns: int = 0) -> None:
        self.steps.append(what)
        self.turns += turns


@pytest.fixture(scope="module", autouse=True)
def contenders_without_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        yield


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders that misbehave, in a family of their own."""
    monkeypatch.setitem(roster.FAMILIES, "rivals", FamilyInfo("rivals", dict.fromkeys(RIVALS, "misbehaves")))


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that cost little."""
    monkeypatch.setattr("moegen.bench.run.Probe", lambda threads: Probe(threads, 4 << 20))


@pytest.fixture
def tiny(built: Build) -> Subject:
    artifact = built(**TINY)
    return Subject("tiny", artifact.config, artifact=artifact)


@pytest.fixture(scope="module")
def document(built: Build) -> dict[str, Any]:
    """One measured document, for the tests that only read it."""
    artifact = built(**TINY)
    subject = Subject("tiny", artifact.config, artifact=artifact)
    asked = Request((1, 9), (1,), ("uniform", "zipf"), "numpy", dense=True, seed=3, effort=QUICK)
    return bench.bench([subject], asked)


def standings(point: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in point["contenders"]}


# ---------------------------------------------------------------- ceilings and the machine


def test_ceilings_are_measured() -> None:
    with Probe(1, 8 << 20) as probe:
        assert probe.flops_per_s(FMA) > 1e8
        assert probe.read_bytes_per_s() > 1e8
        assert probe.kind("float32") == probe.kind("float16") == FMA
        flags = host_cpu_flags()
        assert probe.kind("bfloat16") in ((BF16_DOT, FMA) if "avx512_bf16" in flags else (FMA,))
        assert probe.flops_per_s(probe.kind("bfloat16")) > 1e8


def test_probes_leave_the_callers_threads_where_they_may_run() -> None:
    """A pinned caller would hand its one processor down to every thread and process that it starts later."""
    before = os.sched_getaffinity(0)
    with Probe(len(before), 8 << 20) as probe:
        probe.flops_per_s(FMA)
        probe.read_bytes_per_s()
    for thread in pathlib.Path("/proc/self/task").iterdir():
        assert os.sched_getaffinity(int(thread.name)) == before


def test_roofline_is_the_tighter_limit() -> None:
    ceilings = Ceilings(FMA, (90.0, 100.0, 500.0), (10.0,))
    assert ceilings.flops_per_s == 100.0
    assert ceilings.roofline_seconds(1000.0, 10.0) == 10.0
    assert ceilings.roofline_seconds(1000.0, 1000.0) == 100.0


def test_probes_compile_for_plain_processors(tmp_path: pathlib.Path) -> None:
    from moegen.toolchain import cxx

    source = ROOT / "templates" / "bench" / "probe.cc"
    for option in ("-mno-avx", "-mavx2"):
        command = [*cxx(), "-O2", "-std=c++17", "-Wall", "-Werror", option, "-fsyntax-only", str(source)]
        assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def test_probes_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"^measuring needs a C\+\+ compiler for its probes: install g\+\+ or clang"):
        Probe(1)


def test_machine() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.processors >= 1
    assert 1 << 20 <= machine.l3_bytes < machine.memory_bytes
    assert 0 < available_bytes() <= machine.memory_bytes


# ---------------------------------------------------------------- what is not quoted


def test_wrong_and_failing_contenders(rivals: None, small_probe: None, tiny: Subject) -> None:
    names = "honest,liar,lazy,crasher,raiser,late,last,refuser"
    document = bench.bench([tiny], Request((3, 5), (1,), against=names, effort=Effort(20, 0.1, patience_seconds=30)))
    (run,) = document["runs"]
    assert run["absent"] == [{"name": "refuser", "reason": "has no time for this layer"}]
    for point in run["points"]:
        found = standings(point)
        assert list(found) == ["moegen", "honest", "liar", "lazy", "crasher", "raiser", "late", "last"]
        for name in ("moegen", "honest", "last"):
            assert found[name]["status"] == "correct", found[name]
            assert 0 < found[name]["relative_l2"] < 3e-6
            assert found[name]["seconds"]["median"] > 0
        assert found["liar"]["status"] == "wrong", found["liar"]
        assert found["liar"]["relative_l2"] == pytest.approx(1e-3, rel=0.01)
        assert re.fullmatch(r"wrong: relative L2 error 1\.0e-03 is above 2e-05", found["liar"]["reason"])
        assert found["lazy"]["status"] == "wrong"
        assert found["lazy"]["relative_l2"] is None, "poison shows that nothing was written"
        assert found["crasher"]["reason"] == "crashed with SIGSEGV"
        assert found["raiser"]["reason"] == "RuntimeError: this library cannot"
        assert found["late"]["reason"] == "ended with exit code 3"
        for name in ("liar", "lazy", "crasher", "raiser", "late"):
            assert found[name]["status"] in ("wrong", "failed")
            assert found[name]["seconds"] is found[name]["tokens_per_s"] is found[name]["ratio_to_moegen"] is None
            assert found[name]["samples"] == []
    text = "\n".join(printing.point_lines(run["points"][0], run))
    assert re.search(r"^liar +WRONG +1\.0e-03 +wrong: relative L2 error", text, re.MULTILINE)
    assert re.search(r"^crasher +- +crashed with SIGSEGV$", text, re.MULTILINE)


def test_hanging_contender(rivals: None, small_probe: None, tiny: Subject) -> None:
    effort = Effort(1, 0.1, patience_seconds=3)
    document = bench.bench([tiny], Request((2, 3), (1,), against="hanger,last", effort=effort))
    for point in document["runs"][0]["points"]:
        assert standings(point)["hanger"]["reason"] == "did not answer within 3 s"
        assert standings(point)["last"]["status"] == "correct"


def test_families_that_are_not_there(monkeypatch: pytest.MonkeyPatch, small_probe: None, tiny: Subject) -> None:
    monkeypatch.setitem(roster.FAMILIES, "gone", FamilyInfo("gone", {"gone": ""}, needs=("no_such_package",)))
    monkeypatch.setitem(roster.FAMILIES, "broken", FamilyInfo("moegen.no_such_module", {"broken": ""}))
    document = bench.bench([tiny], Request((1,), (1,), against="gone,broken", effort=QUICK))
    reasons = {entry["name"]: entry["reason"] for entry in document["runs"][0]["absent"]}
    assert reasons["gone"] == "no_such_package not installed: pip install 'moegen[bench]'"
    assert reasons["broken"] == "ModuleNotFoundError: No module named 'moegen.no_such_module'"


def test_slow_contenders_are_left_out_of_larger_points(monkeypatch: pytest.MonkeyPatch, small_probe: None, tiny: Subject) -> None:
    effort = Effort(1, 0.1, most_call_seconds=0.0)
    found = bench.bench([tiny], Request((1, 2), (1,), against="none", effort=effort))["runs"][0]["points"]
    assert found[0]["contenders"][0]["status"] == "correct"
    assert re.fullmatch(r"left out: a call took 0\.0 s at 1 tokens already", found[1]["contenders"][0]["reason"])


@pytest.mark.slow
def test_compiled_torch(monkeypatch: pytest.MonkeyPatch, small_probe: None, tiny: Subject) -> None:
    pytest.importorskip("torch", reason="the contenders of torch need torch==2.13.0, the CPU build")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    document = bench.bench(
        [tiny], Request((5,), (1,), against="torch,onednn", effort=dataclasses.replace(QUICK, patience_seconds=300))
    )
    found = standings(document["runs"][0]["points"][0])
    assert list(found) == ["moegen", "torch-loop", "torch-grouped", "torch-compiled", "torch-onednn"]
    assert {entry["status"] for entry in found.values()} == {"correct"}, found


# ---------------------------------------------------------------- the results


def test_schema(document: dict[str, Any]) -> None:
    assert document["schema_version"] == 1
    assert document["kind"] == "moegen-bench"
    assert set(document) == {"schema_version", "kind", "created", "versions", "machine", "runs"}
    assert document["versions"]["moegen"] == moegen.__version__
    assert set(document["machine"]) == {"cpu", "processors", "l3_bytes", "memory_bytes"}
    assert [run["name"] for run in document["runs"]] == ["tiny float32 1 thread uniform", "tiny float32 1 thread zipf"]
    json.loads(json.dumps(document))
    for run in document["runs"]:
        assert moegen.MoEConfig.from_dict(run["config"]) == CONFIG
        assert run["preset"] is run["scaled"] is run["seconds"]["build"] is None
        assert all(run["seconds"][name] > 0 for name in ("load", "bind", "first_call"))
        assert run["weights_bytes"] == 4 * (4 * 32 + 4 * 3 * 32 * 32)
        assert run["packed_bytes"] >= run["weights_bytes"]
        assert run["library_bytes"] > 10_000
        assert [point["tokens"] for point in run["points"]] == [1, 9]


def test_points(document: dict[str, Any]) -> None:
    for point in (point for run in document["runs"] for point in run["points"]):
        assert point["flops"] == point["tokens"] * (2 * 32 * (2 * 3 * 32 + 4))
        assert len(point["expert_load"]) == 4
        assert 2 <= point["active_experts"] <= 4
        assert point["weight_bytes_read"] == 4 * (point["active_experts"] * 3 * 32 * 32 + 4 * 32)
        peak = point["ceilings"]
        assert peak["kind"] == "fma"
        assert min(peak["flops_samples"] + peak["read_samples"]) > 0
        assert len(peak["flops_samples"]) == len(peak["read_samples"]) == 1 + QUICK.rounds * 4, "between all turns"
        assert {"router", "topk", "up", "down", "finish"} <= set(point["parts"])
        assert point["workspace_bytes"] > 0
        assert point["dense"]["arithmetic_ratio"] == 2
        assert point["dense"]["seconds"] > 0
        assert "2 calls of moegen's own experts" in point["dense"]["how"]
        for entry in point["contenders"]:
            times = entry["seconds"]
            assert times["min"] <= times["median"] <= times["p95"] <= times["p99"] <= times["max"]
            assert 0 < len(entry["samples"]) <= min(200, entry["calls"])
            assert entry["tokens_per_s"] == pytest.approx(point["tokens"] / times["median"])
            assert entry["roofline_fraction"] == pytest.approx(point["roofline_seconds"] / times["median"])
            assert entry["bytes_per_s"] == pytest.approx(point["weight_bytes_read"] / times["median"])
        assert standings(point)["moegen"]["ratio_to_moegen"] == 1.0


def test_csv(document: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(results.as_csv(document))))
    assert len(rows) == 2 * 2 * 3
    assert {row["contender"] for row in rows} == {"moegen", "numpy-naive", "numpy-grouped"}
    entry = document["runs"][0]["points"][0]["contenders"][0]
    assert float(rows[0]["median_seconds"]) == entry["seconds"]["median"]
    assert rows[0]["routing"] == "uniform"
    assert rows[0]["experts"] == "4"
    assert rows[0]["scaled"] == ""


def test_tables(document: dict[str, Any]) -> None:
    run = document["runs"][0]
    text = "\n".join([*printing.run_lines(run), *printing.point_lines(run["points"][1], run)])
    assert "built already" in text
    assert "9 tokens; " in text
    assert "contender" in text
    assert re.search(r"^moegen +\S+ [mµ]s +\S+ [mµ]s +[\d,.]+ +[\d.]+ +[\d.]+ +\d+% +1\.00 +\de-|\d\.\de-", text, re.MULTILINE)
    assert re.search(r"^parts: router ", text, re.MULTILINE)
    assert re.search(r"^dense: .* times moegen's \(arithmetic: 2\.00\)", text, re.MULTILINE)


def test_documents_are_checked(tmp_path: pathlib.Path, document: dict[str, Any]) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(MeasureError, match="cannot read"):
        results.read_document(path)
    for text, message in (("{", "not readable JSON"), ("{}", "does not hold results"), ('{"kind": "moegen-bench"}', "schema None")):
        path.write_text(text)
        with pytest.raises(MeasureError, match=message):
            results.read_document(path)
    results.write_document(document, path)
    assert results.read_document(path)["runs"][0]["name"] == document["runs"][0]["name"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(28, "No space left on device")  # a write has no name

    monkeypatch.setattr("pathlib.Path.write_text", fill)
    with pytest.raises(OSError, match=r"No space left on device: .*bench\.json"):
        results.write_document(results.new_document(), tmp_path / "bench.json")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is asked for


def test_scaled_presets_say_so(monkeypatch: pytest.MonkeyPatch, small_probe: None, built: Build) -> None:
    big = moegen.MoEConfig(experts=32, top_k=2, hidden=32, intermediate=32)
    monkeypatch.setitem(presets.PRESETS, "big", big)
    small = built(experts=16, top_k=2, hidden=32, intermediate=32)
    request = Request((1,), (1,), against="none", memory_bytes=500_000, store=small.path.parent, effort=QUICK)
    (run,) = bench.bench([bench.preset_subject("big")], request)["runs"]
    assert run["config"]["experts"] == 16
    assert run["scaled"]["changes"] == {"experts": [32, 16]}
    assert "2 copies of the weights" in run["scaled"]["why"]
    assert "SCALED DOWN  experts 32 -> 16: 2 copies" in "\n".join(printing.run_lines(run))
    assert "scaled" in "\n".join(printing.point_lines(run["points"][0], run))


def test_few_bits(small_probe: None, built: Build) -> None:
    """Contenders that keep whole weights are held to those, and have more bytes to read; what rounding changes stands beside."""
    artifact = built(**TINY, weight_dtype="int4", weight_group=32)
    found = bench.bench([Subject("few", artifact.config, artifact=artifact)], Request((5,), (1,), against="numpy", effort=QUICK))
    (point,) = found["runs"][0]["points"]
    by_name = standings(point)
    assert {entry["status"] for entry in by_name.values()} == {"correct"}
    assert max(entry["relative_l2"] for entry in by_name.values()) < 1e-5
    assert 0.02 < point["rounding_relative_l2"] < 0.5
    assert by_name["moegen"]["bytes_per_s"] * by_name["moegen"]["seconds"]["median"] == pytest.approx(point["weight_bytes_read"])
    whole = by_name["numpy-grouped"]["bytes_per_s"] * by_name["numpy-grouped"]["seconds"]["median"]
    assert 3 < whole / point["weight_bytes_read"] < 8
    assert "int4" in "\n".join(printing.point_lines(point, found["runs"][0]))


def test_layers_of_the_users_own_are_not_scaled(tiny: Subject) -> None:
    with pytest.raises(MeasureError, match=r"^tiny needs 99\.3 kB for 2 copies of its weights, 1\.0 kB may be used: "):
        bench.bench([tiny], Request((1,), (1,), against="none", memory_bytes=1000))


@pytest.mark.parametrize(
    ("request_fields", "error", "message"),
    [
        ({"tokens": (0,)}, MeasureError, "tokens=0 must be at least 1"),
        ({"threads": (100_000,)}, MeasureError, r"threads=100000 is more than the \d+ processors"),
        ({"routings": ("even",)}, MeasureError, "routing='even' must be one of uniform, zipf"),
        ({"against": "numpy,nobody"}, ConfigError, "unknown contender 'nobody': known are all, none, moegen, numpy,"),
    ],
)
def test_impossible_requests(request_fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bench.bench([], Request(**request_fields))


def test_chosen_contenders() -> None:
    assert roster.chosen_families("none") == {"moegen": ["moegen"]}
    assert roster.chosen_families("numpy-naive,torch") == {
        "moegen": ["moegen"],
        "numpy": ["numpy-naive"],
        "torch": ["torch-loop", "torch-grouped", "torch-compiled"],
    }
    assert set(roster.chosen_families("all")) == set(roster.FAMILIES)


# ---------------------------------------------------------------- the command line


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def sentence(*arguments: object, code: int = 1) -> str:
    said = run(*arguments, code=code)
    assert said.stdout == ""
    found = re.fullmatch(r"(?:Usage: .*\nTry .*\n\n)?Error: (.+)\n", said.stderr)
    assert found, said.stderr
    return found[1]


def test_command(small_probe: None, tiny: Subject, tmp_path: pathlib.Path) -> None:
    assert tiny.artifact is not None
    files = tmp_path / "out.json", tmp_path / "out.csv"
    arguments = ("--no-peers", "--tokens", "1,3", "--threads", "1", "--rounds", "1", "--min-ms", "0.1")
    said = run("bench", tiny.artifact.path, *arguments, "--json", files[0], "--csv", files[1])
    assert said.stdout.count("contender") == 2
    assert re.search(r"^moegen .* 1\.00 +\d", said.stdout, re.MULTILINE)
    assert said.stderr == f"wrote {files[0]}\nwrote {files[1]}\n"
    assert [p["tokens"] for p in results.read_document(files[0])["runs"][0]["points"]] == [1, 3]
    assert files[1].read_text().count("\n") == 3


def test_layers_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Subject], Request]] = []
    monkeypatch.setattr(running, "bench", lambda subjects, request, *_: asked.append((subjects, request)))
    run("bench", "olmoe", "mixtral", "--dtype", "float32,bfloat16", "--tokens", "16,4096", "--routing", "uniform,zipf")
    run("bench", "--experts", "4,8", "--top-k", "2", "--hidden", "64", "--threads", "1", "--against", "numpy", "--memory-gb", "2.5")
    run("bench", "deepseek-v3", "--experts", "16", "--hidden", "512")
    subjects, request = asked[0]
    assert [(s.preset, s.config.dtype) for s in subjects] == [
        (name, dtype) for name in ("olmoe", "mixtral") for dtype in ("float32", "bfloat16")
    ]
    assert request == Request((16, 4096), routings=("uniform", "zipf"))
    subjects, request = asked[1]
    assert [(s.label, s.preset) for s in subjects] == [("E4 K2 H64 I256", None), ("E8 K2 H64 I256", None)]
    assert (request.threads, request.against, request.memory_bytes) == ((1,), "numpy", 2_500_000_000)
    changed = asked[2][0][0].config
    assert (changed.experts, changed.hidden, changed.n_group, changed.gating) == (16, 512, 8, "sigmoid")


def test_list() -> None:
    text = run("bench", "--list").stdout
    assert all(re.search(rf"^{name} +E\d", text, re.MULTILINE) for name in presets.PRESETS)
    assert re.search(r"^numpy-naive +installed +a token at a time", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["olmo"], 1, r"unknown preset 'olmo': did you mean 'olmoe'\? presets are seed, .*; nor is it an artifact: there is no"),
        ([], 2, r"Name a preset \(--list shows them\) or an artifact"),
        (["seed", "--dtype", "int4"], 2, "'int4' is not one of 'float32', 'bfloat16', 'float16'"),
        (["seed", "--routing", "even"], 2, "'even' is not one of 'uniform', 'zipf'"),
        (["seed", "--tokens", "few"], 2, "'few' is not a whole number"),
        (["seed", "--tokens", "0"], 1, "tokens=0 must be at least 1"),
        (["seed", "--against", "nobody"], 1, "unknown contender 'nobody'"),
        (["seed", "--top-k", "9"], 1, "top_k=9 must be between 1 and 8"),
        (["seed", "--model", "config.json"], 2, "--model is a layer of its own"),
        (["seed", "--resume"], 2, "--resume needs --json FILE"),
    ],
)
def test_refusals(arguments: list[str], code: int, said: str) -> None:
    assert re.search(said, sentence("bench", *arguments, code=code))


def test_artifacts_cannot_be_changed(tiny: Subject) -> None:
    assert tiny.artifact is not None
    assert "is compiled already" in sentence("bench", tiny.artifact.path, "--experts", "8", code=2)


def test_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, small_probe: None, tiny: Subject, tmp_path: pathlib.Path
) -> None:
    assert tiny.artifact is not None
    real, measured = running.measure_point, []

    def interrupted(*arguments: Any, **options: Any) -> dict[str, Any]:
        measured.append(arguments[3])
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return real(*arguments, **options)

    monkeypatch.setattr(running, "measure_point", interrupted)
    file = tmp_path / "out.json"
    arguments = ("bench", tiny.artifact.path, "--no-peers", "--tokens", "1,2,3", "--threads", "1", "--rounds", "1", "--json", file)
    assert run(*arguments, code=130).stderr == "Interrupted.\n"
    assert [p["tokens"] for p in results.read_document(file)["runs"][0]["points"]] == [1]
    run(*arguments, "--resume")
    assert measured == [1, 2, 2, 3], "what is there is not measured again"
    (again,) = results.read_document(file)["runs"]
    assert [p["tokens"] for p in again["points"]] == [1, 2, 3]


@pytest.mark.slow
def test_interrupt_leaves_nothing_behind(tiny: Subject, tmp_path: pathlib.Path) -> None:
    """Ctrl-C in the middle of a point: no process and no folder stays."""
    assert tiny.artifact is not None
    file = tmp_path / "out.json"
    options = ("--against", "numpy", "--tokens", "1,2", "--rounds", "2000", "--threads", "1", "--json", file)
    command = [sys.executable, "-m", "moegen.cli", "bench", tiny.artifact.path, *options]
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(_workers(process.pid))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = list(_workers(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Interrupted.\n"
    assert not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]


def _workers(parent: int) -> Iterator[int]:
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            yield int(path.parent.name)


def test_poison_is_not_a_number() -> None:
    import numpy as np

    from moegen.arrays import to_float32
    from moegen.bench.contenders.family import poison

    for dtype, storage in (("float32", np.float32), ("bfloat16", np.uint16), ("float16", np.float16)):
        array = HostArray(np.zeros((2, 3), storage), dtype)
        poison(array)
        assert np.isnan(to_float32(array)).all()


def test_dense_takes_off_what_is_repeated() -> None:
    config = moegen.MoEConfig(experts=5, top_k=2, hidden=8)
    entrant = measure.Entrant("moegen-dense", samples=[3.0])
    dense = measure._dense(config, [entrant], 1.0)
    assert dense is not None
    assert dense["seconds"] == pytest.approx(2.5)
    assert "3 calls" in dense["how"]
    assert "times 0.833" in dense["how"]
