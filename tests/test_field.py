"""The run on a GPU, as far as there is none: what it would do, how it ends, and whether the contenders compute the same thing."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from helpers import environment, run_python

import moegen
from moegen.cuda.device_count import devices
from moegen.errors import MeasureError
from moegen.field import checks, jobs, run, stock, summary
from moegen.field.budget import Budget
from moegen.field.cells import FIRST_TOKENS, LAYERS, VARIANTS, Cell, cells
from moegen.field.targets import TARGETS, TOKENS, target
from moegen.field.watching import Lost, Measurer
from moegen.presets import PRESETS

CELL = Cell("olmoe", 16, "uniform")


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------- order and time


def test_the_most_important_cells_come_first() -> None:
    every = cells()
    assert len(set(every)) == len(every) == len(LAYERS) * len(TOKENS) * 2
    first = every[: len(LAYERS) * len(FIRST_TOKENS)]
    assert {(cell.layer, cell.tokens, cell.routing) for cell in first} == {(n, t, "uniform") for n in LAYERS for t in FIRST_TOKENS}
    assert [cell.routing for cell in every] == ["uniform"] * 30 + ["zipf"] * 30


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MeasureError, match="'mixtrale' must be one of seed, mixtral"):
        cells(("mixtrale",))
    with pytest.raises(MeasureError, match="'skewed' must be one of uniform, zipf"):
        cells(routings=("skewed",))


def test_the_budget_knows_what_sizes_take() -> None:
    clock = Clock()
    budget = Budget(60.0, clock)
    assert budget.allows(1)
    assert budget.expected(16384) == budget.expected(1)
    budget.took(16, 4.0)
    budget.took(16, 3.0)
    budget.took(4096, 20.0)
    assert budget.expected(16) == pytest.approx(1.3 * 4)
    assert budget.expected(64) == pytest.approx(1.3 * 4)
    assert budget.expected(16384) == pytest.approx(1.3 * 20)
    clock.now += 40
    assert budget.allows(1)
    assert not budget.allows(4096)
    clock.now += 100
    assert budget.left == 0.0


def test_targets_are_those_of_the_presets() -> None:
    assert set(TARGETS) == set(LAYERS) <= set(PRESETS)
    for rows in TARGETS.values():
        assert tuple(rows) == TOKENS
        for one in rows.values():
            assert one.roofline < one.ours < one.match
    ours = target("qwen3-30b-a3b", 4096)
    assert ours is not None
    assert ours.ours == pytest.approx(620e-6)
    assert target("seed", 1) is None


def test_small_layers_can_be_planned_for_cuda() -> None:
    """Building them all would take minutes; that each is legal shows at once."""
    from moegen.cuda.planning import plan

    for config in VARIANTS.values():
        plan(config, run.DEFAULT_ARCH)


# ---------------------------------------------------------------- other programs


def test_jobs_end_in_time_and_say_how() -> None:
    python = sys.executable
    quick = jobs.Job("quick", (python, "-c", "import os; print(os.environ['SAID'])"), 20, {"SAID": "hello"})
    failing = jobs.Job("failing", (python, "-c", "raise SystemExit('no')"), 20)
    hanging = jobs.Job("hanging", (python, "-c", "import time; print('on', flush=True); time.sleep(60)"), 0.8)
    absent = jobs.Job("absent", ("/nowhere/compute-sanitizer",), 20)
    done = {one.name: one for one in jobs.run_together([quick, failing, hanging, absent])}
    assert done["quick"].passed
    assert done["quick"].output == "hello\n"
    assert (done["failing"].code, done["failing"].said) == (1, "no\n")
    assert done["hanging"].status == jobs.TIMED_OUT
    assert not done["hanging"].passed
    assert done["absent"].status == jobs.ABSENT
    assert jobs.run_together([]) == []


def outcome(name: str, code: int | None = 0, output: str = "", said: str = "", status: str = jobs.ENDED) -> jobs.Outcome:
    return jobs.Outcome(name, status, code, output, said, 3.21)


def test_verdicts() -> None:
    report = json.dumps({"artifact": "/x/moe-a", "status": "failed", "failures": ["uniform routing, T=1: off"]})
    failed = checks.verdict(outcome("proof of a", 1, report))
    assert (failed["status"], failed["why"]) == ("failed", "moe-a: uniform routing, T=1: off")
    right = json.dumps({"artifact": "/x/moe-a", "status": "passed", "failures": [], "worst_relative_l2": 3.2e-3})
    assert checks.verdict(outcome("proof of a", 0, right + "\n" + right))["why"] == "2 layers, relative L2 error at most 3.2e-03"
    assert checks.verdict(outcome("GPU tests", 0, "....\n12 passed in 3.2s\n"))["why"] == "12 passed in 3.2s"
    assert checks.verdict(outcome("GPU tests", 0, "ss\n2 skipped in 3.2s\n"))["status"] == "skipped"
    broken = checks.verdict(outcome("GPU tests", 1, "F\n1 failed in 1s\n"))
    assert (broken["status"], broken["why"]) == ("failed", "exit code 1: 1 failed in 1s")
    clean = checks.verdict(outcome("memcheck", 0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n" + report))
    assert (clean["status"], clean["why"]) == ("passed", "ERROR SUMMARY: 0 errors")
    assert checks.verdict(outcome("racecheck", 1, "========= Error: Device not supported. Please refer to"))["status"] == "skipped"
    assert checks.verdict(outcome("memcheck", 9, "========= ERROR SUMMARY: 2 errors"))["status"] == "failed"
    assert checks.verdict(outcome("memcheck", None, status=jobs.ABSENT, said="no such program"))["status"] == "skipped"
    assert checks.verdict(outcome("GPU tests", None, status=jobs.TIMED_OUT))["why"] == "did not end within 3 s"


def test_the_checks_cover_proofs_tests_and_the_checker(tmp_path: pathlib.Path) -> None:
    proofs = checks.proofs(["/a", "/b"], {"olmoe": "/c"}, 9.0)
    assert [job.name for job in proofs] == ["proof of olmoe", "proof of small layers"]
    assert proofs[1].command[-4:] == ("/a", "/b", "--tokens", "0,1,2,17,300,1500")
    (tests,) = checks.tests(tmp_path, 9.0)
    assert pathlib.Path(tests.command[-1]).is_file()
    assert tests.environment == {checks.ARTIFACTS_VARIABLE: str(tmp_path)}
    assert [job.command[2] for job in checks.checkers("sanitizer", "/a", 9.0)] == ["memcheck", "racecheck"]


# ---------------------------------------------------------------- the watched process

WORKER = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    say = lambda **what: print(json.dumps(what), flush=True)
    for name in ("moegen", "hanger", "crasher"):
        if name in asked["without"]:
            continue
        say(at=name, what="timing")
        if name == "hanger": time.sleep(60)
        if name == "crasher": os._exit(3)
    if asked["cell"]["tokens"] == 7:
        say(refused="too odd")
        continue
    say(result={**asked["cell"], "left_out": sorted(asked["without"]), "process": os.getpid()})
"""


def measurer() -> Measurer:
    return Measurer(sys.stderr, command=(sys.executable, "-c", WORKER), starting_seconds=20, silent_seconds=0.6)


def test_a_process_that_hangs_or_dies_is_replaced() -> None:
    watched = measurer()
    with pytest.raises(Lost, match=r"hanger, timing: nothing for 1 s") as hung:
        watched.measure(CELL, [], {}, 30.0)
    with pytest.raises(Lost, match=r"crasher, timing: the process ended with exit code 3") as died:
        watched.measure(CELL, [], {"hanger": "hung"}, 30.0)
    assert (hung.value.contender, died.value.contender) == ("hanger", "crasher")
    known = {"hanger": "hung", "crasher": "died"}
    first = watched.measure(CELL, [], known, 30.0)
    assert first["left_out"] == ["crasher", "hanger"]
    assert watched.measure(CELL, [], known, 30.0)["process"] == first["process"]
    with pytest.raises(MeasureError, match="too odd"):
        watched.measure(Cell("olmoe", 7, "uniform"), [], known, 30.0)
    with pytest.raises(Lost, match="hanger, timing: the time is over"):
        watched.measure(CELL, [], {"crasher": "died"}, 0.3)
    watched.close()


class Watched:
    """Measures by table: a dictionary, or what to raise, once each."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def measure(self, cell: Cell, artifacts: list[str], without: dict[str, str], seconds: float) -> dict[str, Any]:
        self.asked.append((cell, dict(without)))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cell.to_dict() | {"contenders": [], "work": {"flops": 1.0, "bytes": 1.0, "active_experts": 1.0}}


def empty_document() -> dict[str, Any]:
    return {"cells": [], "left_out": [], "lost": []}


def test_lost_contenders_are_left_out_of_cells_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = type("Made", (), {"path": pathlib.Path("/a")})()
    monkeypatch.setattr(stock, "of_layer", lambda config, artifacts: [artifact])
    twice = [CELL, Cell("olmoe", 16, "zipf"), Cell("olmoe", 64, "zipf")]
    watched, document = Watched(Lost("it hung", "rival"), {}, {}, MeasureError("odd")), empty_document()
    done = list(run.measure(watched, twice, [artifact], Budget(1000.0, Clock()), document, lambda line: None))
    assert done == twice[:2]
    assert [without for _, without in watched.asked] == [{}, {"rival": "it hung"}, {"rival": "it hung"}, {}]
    assert document["left_out"] == [{"what": "olmoe, T=64, zipf", "why": "odd"}]
    assert document["lost"][0]["contender"] == "rival"


def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = type("Made", (), {"path": pathlib.Path("/a")})()
    monkeypatch.setattr(stock, "of_layer", lambda config, artifacts: [artifact])
    document = empty_document()
    assert not list(run.measure(Watched(), [CELL], [artifact], Budget(1.0, Clock()), document, lambda line: None))
    assert document["left_out"][0]["what"] == "olmoe, T=16, uniform"
    assert document["left_out"][0]["why"].startswith("no time")


def test_a_process_that_cannot_live_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = type("Made", (), {"path": pathlib.Path("/a")})()
    monkeypatch.setattr(stock, "of_layer", lambda config, artifacts: [artifact])
    watched, document = Watched(*[Lost("starting: exit code 1", "")] * 3), empty_document()
    wanted = [Cell("olmoe", 16, "zipf")] * 5
    assert not list(run.measure(watched, wanted, [artifact], Budget(1000.0, Clock()), document, lambda line: None))
    assert [entry["why"] for entry in document["left_out"]] == ["starting: exit code 1"] * 3 + [
        "the measuring process does not stay alive"
    ] * 2


def test_tuning_is_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    asked: list[jobs.Job] = []

    def ended(job: jobs.Job) -> jobs.Outcome:
        asked.append(job)
        if job.name == "help":
            return real(job)  # this moegen's own
        return outcome(job.name, None, "64 candidates\n", status=jobs.TIMED_OUT)

    real = jobs.run
    monkeypatch.setattr(jobs, "run", ended)
    said = run.tune(run.Request(tmp_path, 9.0, tmp_path, layers=("olmoe",), tune_minutes=2.0), io.StringIO())
    assert said == {"status": jobs.TIMED_OUT, "why": "the time was over"}
    assert asked[1].command[2:] == ("moegen", "tune", "--target", "cuda", "--preset", "olmoe", "--arch", "sm_90a")
    assert (asked[1].seconds, asked[1].environment) == (120.0, {"MOEGEN_LOGS": str(tmp_path / "tuning")})


# ---------------------------------------------------------------- results


def entry(name: str, *samples: float, **fields: Any) -> dict[str, Any]:
    found = {"median": samples[1], "low": samples[0], "high": samples[2]} if samples else None
    plain = {"status": "correct", "reason": None, "relative_l2": 4e-3, "mode": "graph", "launches": {"kernels": 4.0}, "ratio": None}
    return {"name": name, "seconds": found} | plain | fields


def document() -> dict[str, Any]:
    contenders = [
        entry("moegen", 180e-6, 185e-6, 190e-6, ratio={"median": 1.0, "low": 1.0, "high": 1.0}),
        entry("torch-grouped", 360e-6, 370e-6, 380e-6, ratio={"median": 2.0, "low": 1.95, "high": 2.05}),
        entry("triton-fused", status="wrong", reason="wrong: relative L2 error 1.0e+00 is above 2e-02", launches=None, mode=None),
    ]
    work = {"flops": 1e9, "bytes": 4.3e12 * 165e-6, "active_experts": 56.0}
    ceilings = [{"flops_per_s": 790e12, "bytes_per_s": 4.2e12}, {"flops_per_s": 780e12, "bytes_per_s": 4.3e12}]
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "surroundings": {"device": {"name": "NVIDIA H200", "driver_version": "580"}, "packages": {"torch": "2.11.0", "tvm": None}},
        "checks": [{"name": "memcheck", "status": "passed", "seconds": 12.0, "why": "ERROR SUMMARY: 0 errors"}],
        "cells": [CELL.to_dict() | {"work": work, "ceilings": ceilings, "contenders": contenders}],
        "left_out": [{"what": "olmoe, T=64, zipf", "why": "no time"}],
    }


def test_the_table_has_ratios_targets_and_what_went_wrong() -> None:
    text = summary.markdown(document())
    row = next(line for line in text.splitlines() if line.startswith("| 16 |"))
    cells_of = [part.strip() for part in row.strip("|").split("|")]
    assert cells_of == [
        "16", "uniform", "185 µs (180 µs..190 µs)", "4", "165 µs", "89%", "175 µs", "190 µs", "2.00 (1.95..2.05)", "wrong"
    ]  # fmt: skip
    assert "790 TFLOP/s (bf16, cuBLAS), 4.30 TB/s" in text
    assert "* T=16, uniform: triton-fused wrong: wrong: relative L2 error 1.0e+00" in text
    assert "* olmoe, T=64, zipf: no time" in text
    assert "| memcheck | passed | 12.0 | ERROR SUMMARY: 0 errors |" in text
    assert summary.closing(document()).split() == ["olmoe", "T=16", "uniform", "185", "µs", "torch-grouped", "2.00"]


def test_targets_are_quoted_for_their_device_only() -> None:
    other = document()
    other["surroundings"]["device"]["name"] = "NVIDIA H100 80GB HBM3"
    assert "175 µs" not in summary.markdown(other)


def test_files_are_written(tmp_path: pathlib.Path) -> None:
    run.write(document(), tmp_path)
    assert json.loads((tmp_path / run.RESULTS).read_text(encoding="utf-8")) == document()
    assert (tmp_path / run.TABLE).read_text(encoding="utf-8").startswith("# moegen on NVIDIA H200")
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    from moegen.field.drawing import draw

    assert draw(document(), tmp_path) == ["roofline.png", "ratios.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("roofline.png", "ratios.png"))
    assert draw(document() | {"cells": []}, tmp_path) == []


# ---------------------------------------------------------------- without a device


@pytest.mark.skipif(devices() > 0, reason="there is a device here")
def test_without_a_device_there_are_no_numbers(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "moegen.field", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "moegen.field: there is no CUDA device here, or no NVIDIA driver, and nothing is measured without one\n"
    assert not (tmp_path / "out").exists()


def test_an_emulated_device_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(run, "devices", lambda: 1)
    monkeypatch.setenv("MOEGEN_EMULATED_ARCH", "sm_90a")
    with pytest.raises(MeasureError, match="an emulated device, whose times mean nothing"):
        run.run(run.Request(tmp_path / "out", 1.0, tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_run_itself_needs_neither_torch_nor_the_compiler() -> None:
    code = "import sys, moegen.field.__main__; print({'tvm', 'torch', 'triton', 'jinja2', 'matplotlib'} & set(sys.modules))"
    done = run_python(code)
    assert done.stdout == "set()\n", done.stderr


def test_without_artifacts_it_says_what_to_do(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(moegen.ArtifactError, match="--only-build --artifacts FOLDER"):
        run.prepare(run.Request(tmp_path, 1.0, tmp_path / "none"), lambda line: None)


# ---------------------------------------------------------------- the contenders' arithmetic

CLAMPED = {"activation": "swiglu_clamped", "expert_bias": True}
INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from contending import error_of
from moegen.field.fused_experts import Fused, Tile
clamped = {"activation": "swiglu_clamped", "expert_bias": True}
for fields, tokens, routing, tile in (
    ({}, 9, "uniform", (16, 32, 32, 1)), (clamped, 24, "zipf", (16, 16, 16, 2)), ({"experts": 40}, 1, "uniform", (16, 32, 32, 1)),
):
    error = error_of(lambda weights: Fused(weights, Tile(*tile, 4, 3)), fields, tokens, routing)
    assert error < 2e-6, (fields, tokens, routing, error)
print("all right")
"""


@pytest.mark.parametrize("name", ["Grouped", "Loop"])
@pytest.mark.parametrize("fields", [{}, CLAMPED, {"activation": "relu2"}])
def test_torch_computes_the_same_on_the_processor(name: str, fields: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from contending import error_of

    from moegen.field import torch_experts

    for tokens, routing in ((1, "uniform"), (40, "zipf")):
        assert error_of(getattr(torch_experts, name), fields, tokens, routing) < 2e-6


def test_triton_computes_the_same_on_the_processor() -> None:
    """By Triton's interpreter; in a process of its own, since whether to interpret is decided when kernels are defined."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    package, here = pathlib.Path(moegen.__file__).parent.parent, pathlib.Path(__file__).parent
    around = environment(PYTHONPATH=str(package), TRITON_INTERPRET="1")
    command = [sys.executable, "-c", INTERPRETED, str(here)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "all right\n", done.stderr


def test_truth_is_the_reference() -> None:
    """The float64 expected output is that of `moegen.reference`."""
    torch = pytest.importorskip("torch")
    import numpy as np

    from moegen import reference
    from moegen.cuda_geometry import CudaGeometry
    from moegen.field import material, truth

    config = moegen.MoEConfig(experts=5, top_k=2, hidden=24, intermediate=40, activation="swiglu_clamped", expert_bias=True)
    geometry = CudaGeometry(config)
    weights = material.draw_weights(config, {"packed_bytes": geometry.packed_bytes, "segments": geometry.describe()}, "cpu", 1)
    (batch,) = material.draw_batches(config, 12, "zipf", 1, "cpu", 2)
    i = config.intermediate
    named = {
        "experts.gate.weight": weights.gate_up[:, :i], "experts.up.weight": weights.gate_up[:, i:],
        "experts.gate.bias": weights.gate_up_bias[:, :i], "experts.up.bias": weights.gate_up_bias[:, i:],
        "experts.down.weight": weights.down,
        "experts.down.bias": weights.down_bias,
    }  # fmt: skip
    given = {name: value.double().numpy() for name, value in named.items()}
    right = reference.experts(config, given, batch.x.double().numpy(), batch.ids.numpy(), batch.factors.double().numpy())
    got = truth.expected(weights, batch, list(range(12))).numpy()
    np.testing.assert_allclose(got, right, rtol=1e-9, atol=1e-12)
    assert truth.relative_l2(torch.full((2, 3), torch.nan), torch.ones(2, 3)) == float("inf")
    assert truth.checked(1) == [0]
    assert truth.checked(4096)[0] == 0
    assert truth.checked(4096)[-1] == 4095
    assert len(truth.checked(4096)) == truth.CHECKED_TOKENS


def test_the_blob_is_what_packing_makes() -> None:
    """Weights drawn into a blob lie where the artifact's own layout has them."""
    pytest.importorskip("torch")
    from moegen.cuda_geometry import CudaGeometry
    from moegen.field import material

    config = moegen.MoEConfig(experts=3, top_k=1, hidden=72, intermediate=40, dtype="bfloat16", expert_bias=True)
    geometry = CudaGeometry(config)
    weights = material.draw_weights(config, {"packed_bytes": geometry.packed_bytes, "segments": geometry.describe()}, "cpu", 1)
    up = next(segment for segment in geometry.segments if segment.name == "up")
    n, k = up.shape[2:]
    import torch

    whole = weights.blob[up.offset_bytes : up.offset_bytes + up.size_bytes].view(torch.bfloat16).view(3, 2, n, k)
    assert torch.equal(whole[:, 1, :40, :72], weights.gate_up[:, 40:])
    assert not whole[:, :, 40:].any()
    assert not whole[..., 72:].any()
    assert weights.down.stride(-1) == 1
    assert weights.down_bias.is_contiguous()


def test_zipf_has_favourites() -> None:
    torch = pytest.importorskip("torch")
    from moegen.field import material

    config = moegen.MoEConfig(experts=16, top_k=2, hidden=16, intermediate=16)
    loads = {}
    for routing in ("uniform", "zipf"):
        (batch,) = material.draw_batches(config, 2000, routing, 1, "cpu", 5)
        assert (batch.ids.sort(1).values.diff(dim=1) > 0).all(), "no expert twice"
        assert torch.allclose(batch.factors.sum(1), torch.ones(2000))
        loads[routing] = torch.bincount(batch.ids.reshape(-1), minlength=16).sort(descending=True).values
    assert loads["uniform"][0] < 1.3 * loads["uniform"][-1]
    assert loads["zipf"][0] > 5 * loads["zipf"][-1]
    made = material.work(config, [batch])
    assert made["flops"] == 2.0 * 2000 * 2 * 3 * 16 * 16
    assert made["active_experts"] == 16


class Stopwatch:
    """A `Replay` without a device: it really calls, and takes the time that each contender says it takes."""

    launches = None
    mode = "graph"

    def __init__(self, calls: list[Any]) -> None:
        self.calls, self.outputs = calls, [call() for call in calls]

    def run(self) -> None:
        for index, call in enumerate(self.calls):
            if (made := call()) is not None:
                self.outputs[index] = made

    def poison(self) -> None:
        for out in self.outputs:
            out.fill_(float("nan"))

    def seconds(self, repeats: int) -> float:
        self.run()
        return float(self.calls[0].takes)


class Call:
    """A contender's call that takes so long."""

    def __init__(self, function: Any, takes: float) -> None:
        self.function, self.takes = function, takes

    def __call__(self) -> Any:
        return self.function()


class Honest:
    """A right contender; `bend` makes it another."""

    def __init__(self, weights: Any, name: str, takes: float, bend: Any = lambda y: y) -> None:
        from moegen.field.torch_experts import Loop

        self.loop, self.name, self.takes, self.bend = Loop(weights), name, takes, bend

    def prepare(self, batch: Any) -> Call:
        call = self.loop.prepare(batch)
        return Call(lambda: self.bend(call()), self.takes)


@dataclasses.dataclass(frozen=True)
class Tile:
    takes: float


class Tuned(Honest):
    """One whose tile decides its time."""

    tile = Tile(0.0)

    def candidates(self, tokens: int) -> list[Tile]:
        return [Tile(0.4), Tile(0.1), Tile(0.3)]

    def prepare(self, batch: Any) -> Call:
        self.takes = self.tile.takes
        return super().prepare(batch)


def raising(error: Exception) -> Any:
    def bend(y: Any) -> Any:
        raise error

    return bend


def test_a_cell_is_measured_and_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from moegen.cuda_geometry import CudaGeometry
    from moegen.field import material, measure

    monkeypatch.setattr(measure, "Replay", Stopwatch)
    monkeypatch.setattr(measure, "_ROUNDS", 5)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = moegen.MoEConfig(experts=4, top_k=2, hidden=16, intermediate=16)
    geometry = CudaGeometry(config)
    weights = material.draw_weights(config, {"packed_bytes": geometry.packed_bytes, "segments": geometry.describe()}, "cpu", 1)
    contenders = [
        Honest(weights, "moegen", 0.2),
        Honest(weights, "liar", 0.1, lambda y: y * 1.01),
        Honest(weights, "raiser", 0.1, raising(ValueError("too\nodd"))),
        Tuned(weights, "tuned", 0.0),
    ]
    steps: list[tuple[str, str]] = []
    result = measure.measure(CELL, weights, contenders, {"missing": "no such package"}, "cpu", 3, lambda *step: steps.append(step))
    rows = {row["name"]: row for row in result["contenders"]}
    assert (rows["moegen"]["status"], rows["moegen"]["seconds"]["median"]) == ("correct", 0.2)
    assert rows["liar"]["status"] == "wrong"
    assert rows["liar"]["reason"].startswith("wrong: relative L2 error 1.0e-02 is above")
    assert rows["liar"]["samples"] == []
    assert (rows["raiser"]["status"], rows["raiser"]["reason"]) == ("failed", "ValueError: too")
    assert (rows["missing"]["status"], rows["missing"]["reason"]) == ("absent", "no such package")
    assert rows["tuned"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert len(rows["tuned"]["samples"]) == measure._ROUNDS
    assert rows["tuned"]["notes"] == {"tile": {"takes": 0.1}}
    assert {name for name, _ in steps} == {"moegen", "liar", "raiser", "tuned"}
    assert summary.standing(result, "moegen") is rows["moegen"]
    json.dumps(result, allow_nan=False)


def test_the_measuring_process_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Its protocol, with the device's parts put aside."""
    torch = pytest.importorskip("torch")
    from moegen.cuda_geometry import CudaGeometry
    from moegen.field import material, measure, worker

    config = moegen.MoEConfig(experts=4, top_k=2, hidden=16, intermediate=16)
    geometry = CudaGeometry(config)

    class Opened:
        name = "moe-of-a-test"
        manifest = {"packed_bytes": geometry.packed_bytes, "segments": geometry.describe()}

    Opened.config = config  # type: ignore[attr-defined]
    on_processor = {"draw_weights": material.draw_weights, "draw_batches": material.draw_batches}
    monkeypatch.setattr(worker, "draw_weights", lambda c, m, device, seed: on_processor["draw_weights"](c, m, "cpu", seed))
    monkeypatch.setattr(
        measure, "draw_batches", lambda c, t, r, n, device, seed: on_processor["draw_batches"](c, t, r, n, "cpu", seed)
    )
    monkeypatch.setattr(measure, "Replay", Stopwatch)
    monkeypatch.setattr(measure, "_ROUNDS", 2)
    monkeypatch.setattr(worker, "Ceilings", lambda device: type("C", (), {"sample": lambda self: {"flops_per_s": 1.0}})())
    monkeypatch.setattr(
        worker, "_makers", lambda w, a, d: [("moegen", lambda: Honest(w, "moegen", 0.2)), ("gone", raising(OSError("x")))]
    )
    monkeypatch.setattr(worker, "open_artifact", lambda path: Opened())
    monkeypatch.setattr(worker, "state", lambda device: {"clocks.sm": "1980 MHz"})
    for name, made in (("set_device", None), ("mem_get_info", (100, 100)), ("empty_cache", None), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, made=made: made)
    asked = [
        {"cell": cell.to_dict(), "artifacts": ["/a"], "without": without}
        for cell, without in ((CELL, {}), (CELL, {"moegen": "hung"}))
    ]
    out = io.StringIO()
    worker.main(io.StringIO("".join(json.dumps(one) + "\n" for one in asked)), out, 0)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    first, second = (line["result"] for line in lines if "result" in line)
    standings = [{row["name"]: (row["status"], row["reason"]) for row in result["contenders"]} for result in (first, second)]
    assert standings[0]["moegen"] == ("correct", None)
    assert standings[0]["gone"][0] == "absent"
    assert standings[1]["moegen"] == ("absent", "hung")
    assert first["clocks"] == [{"clocks.sm": "1980 MHz"}] * 2
    assert all({"at", "what"} == set(line) for line in lines if "result" not in line)


def test_spreads() -> None:
    pytest.importorskip("torch")
    from moegen.field.measure import batch_count, spread

    assert spread([]) is None
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert [batch_count(tokens) for tokens in TOKENS] == [8, 8, 4, 2, 2, 2]
