"""Tuning for CUDA: what may be chosen, which records a plan uses, and measuring on a device, which is emulated or made up here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import built_once, environment
from moegen.schedules.cuda import hopper, tiling
from test_records import decision, put
from test_tune import FakeStand

import moegen
from moegen import choices as cpu_choices
from moegen import cli, records
from moegen.bench import workload
from moegen.compiler import load_module
from moegen.cuda import choices, compiler, emission, emulated_driver, hardware, making, nvidia, planning
from moegen.cuda.architectures import parse
from moegen.cuda.planning import CudaPlan
from moegen.cuda_geometry import CudaGeometry
from moegen.errors import CandidateError, MeasureError, ScheduleError
from moegen.records import Provenance
from moegen.tune import devices, session, verdicts
from moegen.tune.building import Candidate, Workshop
from moegen.tune.session import Request, tune
from moegen.tune.stand import Effort
from moegen.tune.times import points_of

CONFIG = moegen.MoEConfig(experts=4, top_k=2, hidden=64, intermediate=64, activation="relu", dtype="bfloat16")
TARGET = planning.resolve_target("sm_90")
H200 = hardware.Device("NVIDIA H200", (9, 0), 50 << 20, 140 << 30)
KNOBS = {"few": {"up_few.columns": 8, "few_tokens": 1}, "some": {"up_16.stages": 2}, "many": {"rows_up_to_64": 192}}


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with such a device, as far as anybody asks about it."""
    monkeypatch.setattr(hardware, "device", lambda ordinal=0: H200)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, as most machines that build."""
    monkeypatch.setattr(hardware, "device", lambda ordinal=0: None)


def _plan(target: Any = TARGET, **fields: Any) -> CudaPlan:
    return planning.default_plan(dataclasses.replace(CONFIG, **fields), target)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "float32", "shared_intermediate": 96}, {"hidden": 200, "activation": "swiglu"}], ids=str
)
@pytest.mark.parametrize("regime", cpu_choices.REGIMES)
def test_every_candidate_is_legal(regime: str, fields: dict[str, Any]) -> None:
    plan = _plan(**fields)
    found = choices.candidates(plan, regime)
    assert choices.values(plan, regime) in found
    assert len({tuple(sorted(each.items())) for each in found}) == len(found) > 100
    assert len(found) <= choices.MOST_CANDIDATES
    assert found == choices.candidates(plan, regime), "the same whenever it is asked for"
    others = [name for name in cpu_choices.REGIMES if name != regime]
    for candidate in found[:: len(found) // 60]:
        made = choices.chosen(plan, regime, candidate)
        assert choices.values(made, regime) == candidate
        assert [choices.values(made, name) for name in others] == [choices.values(plan, name) for name in others]
        ends = [line.rows_up_to for line in made.regimes[:-1]]
        assert made.regimes[-1].rows_up_to is None
        assert ends == sorted(ends)
        for stage, knobs in made.knobs.items():
            if isinstance(knobs, tiling.Tile):
                product = plan.geometry.products[stage.rpartition("_")[0]]
                tiling.check(knobs, product, plan.geometry.item_bytes, 227 << 10)


def test_what_one_regime_takes_goes_with_what_others_take() -> None:
    lows, highs = ({}, {}), ({}, {})
    for which, regime in enumerate(("some", "many")):
        ends = sorted(each[f"rows_up_to_{(16, 64)[which]}"] for each in choices.candidates(_plan(), regime))
        lows[which]["end"], highs[which]["end"] = ends[0], ends[-1]
    assert highs[0]["end"] < lows[1]["end"]


def test_the_shared_expert_follows() -> None:
    plan = _plan(shared_intermediate=64)
    made = choices.chosen(plan, "some", {"up_16.stages": 3, "up_16.columns": 64})
    assert made.knobs["shared_up_16"] == made.knobs["up_16"] != plan.knobs["up_16"]


@pytest.mark.parametrize(
    ("regime", "wanted", "what"),
    [
        ("some", {"up_16.columns": 24}, "columns=24 must be a multiple"),
        ("some", {"up_16.stages": 9}, "stages=9 must be between 2 and 8"),
        ("some", {"few_tokens": 1}, "'few_tokens' is not a knob of regime 'some'"),
        ("few", {"up_few.columns": 7}, "columns=7 must be 4, 8, 16, 32 or 64"),
        ("few", {"few_tokens": 1000}, "few_tokens=1000 must be between 0 and 4"),
        ("many", {"rows_up_to_64": 20}, "must be at least 1 and ascend"),
    ],
)
def test_illegal_choices(regime: str, wanted: dict[str, int], what: str) -> None:
    with pytest.raises(ScheduleError, match=what):
        choices.chosen(_plan(), regime, wanted)


def test_capacity_has_somebody_count() -> None:
    assert choices.candidates(_plan(capacity_factor=1.0), "few") == [{}], "few tokens are sorted, too: nothing is to be chosen"


def test_hopper_has_knobs_of_its_own() -> None:
    plan = _plan(planning.resolve_target("sm_90a"))
    known = choices.values(plan, "many")
    assert {"up_64.stages", "up_128_hopper.group", "down_128_hopper.stages"} <= set(known)
    assert "up_128.stages" not in known, "what no device of the target runs is not tuned"
    made = choices.chosen(plan, "many", {"down_128_hopper.group": 8})
    assert made.knobs["down_128_hopper"].group == 8
    assert made.knobs["up_128_hopper"] == plan.knobs["up_128_hopper"]
    found = choices.candidates(plan, "many")
    assert choices.values(plan, "many") in found
    for candidate in found[:: len(found) // 40]:
        for side in ("up", "down"):
            hopper.check(
                hopper.GroupedProduct.of(plan.geometry, side), choices.chosen(plan, "many", candidate).knobs[f"{side}_128_hopper"]
            )
    with pytest.raises(ScheduleError, match="stages=99"):
        choices.chosen(plan, "many", {"up_128_hopper.stages": 99})


def test_candidates_are_compiled_without_spills(tmp_path: pathlib.Path) -> None:
    """The kernels of three candidates of both regimes of tiles, lowered together under names of their own."""
    plan = _plan(activation="swiglu", hidden=256, intermediate=256)
    stages = dict(load_module(plan.te_source, tmp_path / "te_source.py").stages())
    wanted = {name: stages[name] for name in ("up_16", "down_16", "up_128", "down_64", "up_few")}
    for number, spread in enumerate((0.3, 0.9)):
        made = plan
        for regime in cpu_choices.REGIMES:
            found = choices.candidates(plan, regime)
            made = choices.chosen(made, regime, found[int(spread * len(found))])
        assert made.knobs != plan.knobs
        program = compiler.lower(wanted, plan.geometry, made.knobs, parse(["sm_90"]))
        folder = tmp_path / str(number)
        folder.mkdir()
        compiled = nvidia.compile_kernels(program.source, parse(["sm_90"]), folder)
        assert set(compiled.cubins[0].spilled_bytes.values()) == {0}


# ---------------------------------------------------------------- records


def _decision(name: str, regime: str = "few", **where: str) -> dict[str, Any]:
    came = dataclasses.asdict(planning.provenance()) | {"processor": "NVIDIA H200"} | where
    return decision(name, regime) | {
        "target": "cuda-sm_90", "layer": records.layer_of(CONFIG), "knobs": KNOBS[regime], "provenance": came,
    }  # fmt: skip


def _used(logs: pathlib.Path, gpus: str = "sm_90") -> dict[str, str]:
    return {regime: record["id"] for regime, record in planning.plan(CONFIG, gpus, logs=logs).records.items()}


def test_a_machine_without_a_device_uses_the_records_of_all(no_device: None, tmp_path: pathlib.Path) -> None:
    put(tmp_path, *(_decision(f"id-{regime}", regime) for regime in KNOBS))
    made = planning.plan(CONFIG, "sm_90", logs=tmp_path)
    assert {regime: record["id"] for regime, record in made.records.items()} == {regime: f"id-{regime}" for regime in KNOBS}
    assert (made.knobs["up_few"].columns, made.few_tokens, made.knobs["up_16"].stages) == (8, 1, 2)
    assert [line.rows_up_to for line in made.regimes] == [24, 192, None]
    assert made.key != planning.plan(CONFIG, "sm_90", tuned=False).key
    assert planning.plan(CONFIG, "sm_90", tuned=False, logs=tmp_path).records == {}
    assert _used(tmp_path, "sm_80") == _used(tmp_path, "sm_90,sm_80") == {}, "each target has its own"
    assert planning.resolve_target("sm_90", tf32=True).slug == "cuda-sm_90-tf32"


def test_a_machine_with_a_device_uses_its_own(h200: None, tmp_path: pathlib.Path) -> None:
    put(tmp_path, _decision("here"), _decision("elsewhere", "some", processor="NVIDIA H100 80GB HBM3"))
    assert _used(tmp_path) == {"few": "here"}
    pending = records.choose(CONFIG, TARGET.slug, cpu_choices.REGIMES, planning.provenance(), tmp_path).open
    assert [line["id"] for line in pending] == ["elsewhere"], "it would be measured"


@pytest.mark.parametrize("where", [{"sources": "other"}, {"compiler": "another"}, {"processor": "emulated sm_90"}], ids=str)
def test_what_is_not_used_anywhere(no_device: None, where: dict[str, str], tmp_path: pathlib.Path) -> None:
    put(tmp_path, _decision("foreign", **where))
    assert _used(tmp_path) == {}
    assert list(verdicts.settle(CONFIG, TARGET, tmp_path)) == [], "there is no device to measure it on"


def test_knobs_of_another_layer_are_no_reason_not_to_build(no_device: None, tmp_path: pathlib.Path) -> None:
    put(tmp_path, _decision("odd") | {"knobs": {"up_few.columns": 7}})
    assert _used(tmp_path) == {}


def test_any_real_device_will_do_where_there_is_none() -> None:
    nowhere = Provenance("s", "c", "")
    assert nowhere.differs_in({"sources": "s", "compiler": "c", "processor": "NVIDIA H200"}) == []
    assert nowhere.differs_in({"sources": "s", "compiler": "c", "processor": "emulated sm_90"}) == ["another processor"]
    assert Provenance("s", "c", "A").differs_in({"sources": "s", "compiler": "c", "processor": "B"}) == ["another processor"]


# ---------------------------------------------------------------- runs


class Stand(FakeStand):
    """Candidates' times by a formula, for a layer on a device."""

    config, target, effort, processor = CONFIG, TARGET, Effort(), H200.name
    facts = property(lambda self: devices.here().facts)

    def tokens(self, regimes: Any) -> list[int]:
        return list(dict.fromkeys(tokens for regime in regimes for tokens in choices.tokens_of(CONFIG, regime)))


def _columns(candidate: Mapping[str, int]) -> float:
    return 0.8 if candidate["up_few.columns"] == 8 else 1.0 + candidate["down_few.columns"] / 1e4


def test_a_run_on_a_device(h200: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(_columns, {2: CandidateError("a reason", "compile")})
    monkeypatch.setattr(session, "open_stand", lambda *_, **__: contextlib.nullcontext(stand))
    asked = Request(CONFIG, TARGET, ("few",), trials=20, logs=tmp_path)
    (decided,) = tune(asked)
    assert decided["better"]
    assert decided["knobs"]["up_few.columns"] == 8
    assert decided["provenance"] == dataclasses.asdict(planning.provenance())
    assert decided["provenance"]["processor"] == "NVIDIA H200"
    assert (decided["target"], decided["l2_bytes"], decided["threads"]) == ("cuda-sm_90", 50 << 20, 1)
    assert {"compiler", "apache-tvm"} <= set(decided["versions"])
    assert _used(tmp_path) == {"few": decided["id"]}
    count = len(stand.built)
    assert tune(asked) == [decided]
    assert len(stand.built) == count, "there was nothing left to do"
    listed = CliRunner().invoke(cli.main, ["tune", "--list", "--logs", str(tmp_path)]).output
    assert "cuda-sm_90" in listed
    assert "used here" in listed


def _tune(*arguments: str) -> Any:
    sizes = [f"--{name}={value}" for name, value in (("experts", 4), ("top-k", 2), ("hidden", 64))]
    return CliRunner().invoke(cli.main, ["tune", *sizes, "--target", "cuda", *arguments])


def test_refusals(no_device: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        done = _tune("--logs", str(tmp_path), *arguments)
        assert done.exit_code == 1
        assert done.output.count("Error:") == 1
        return str(done.output)

    assert "there is no CUDA device here" in refused()
    assert "architecture 'sm_70'" in refused("--arch", "sm_70")
    monkeypatch.setattr(hardware, "device", lambda ordinal=0: H200)
    assert "NVIDIA H200: tune with --arch sm_90 or sm_90a" in refused("--arch", "sm_80")
    assert "threads=2 is for CPUs" in refused("--threads", "2")
    monkeypatch.setattr(hardware, "device", lambda ordinal=0: dataclasses.replace(H200, memory_bytes=1 << 10))
    assert "of weights do not fit on the NVIDIA H200" in refused()
    assert not list(tmp_path.rglob("*.jsonl"))


def test_emulated_times_are_not_recorded() -> None:
    with pytest.raises(MeasureError, match="its times are those of a processor, and are not recorded"):
        devices.admitted("emulated sm_90")
    assert devices.admitted("NVIDIA H200") == "NVIDIA H200"


# ---------------------------------------------------------------- an emulated device

MEASURE = """
import json, os, sys
from moegen.device import DeviceModule
from moegen.tune import device_worker, worker

job, kernels = json.load(sys.stdin)

class Module(DeviceModule):
    def __init__(self, artifact, device=0):
        os.environ["MOEGEN_EMULATED_KERNELS"] = kernels[str(artifact.path)]
        super().__init__(artifact, device)

device_worker.DeviceModule = Module
json.dump(worker.measure(job, device_worker.pair), sys.stdout)
"""


class Emulated:
    """A place whose device is emulated: each artifact runs with its own kernels."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        kernels, around = {}, {}
        for path in map(pathlib.Path, job["artifacts"]):
            source = (path / making.KERNELS).read_text(encoding="utf-8")
            around = emulated_driver.environment(source, self.folder, arch="sm_90")
            kernels[str(path)] = around["MOEGEN_EMULATED_KERNELS"]
        command = [sys.executable, "-c", MEASURE]
        around["PYTHONPATH"] = environment()["PYTHONPATH"]
        done = subprocess.run(command, input=json.dumps([job, kernels]), env=around, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CandidateError(done.stderr.strip().splitlines()[-1], "runtime")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def pair(store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The folders of a default and of a candidate with other kernels and other ends; row blocks of 16 are quick to emulate."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "te_source.py").write_text(emission.te_source(CudaGeometry(CONFIG), TARGET, [16]))
    default = planning.plan_from_source(folder / "te_source.py", "sm_90")
    candidate = choices.chosen(default, "some", {"up_16.columns": 64, "down_16.stages": 2})
    candidate = choices.chosen(candidate, "few", {"few_tokens": 1, "down_few.columns": 8})
    return [str(built_once(store, plan).path) for plan in (default, candidate)]


@pytest.mark.slow
def test_measuring_on_an_emulated_device(pair: list[str], tmp_path: pathlib.Path) -> None:
    folders = [tmp_path / "uniform", tmp_path / "zipf"]
    workload.make(folders[0], CONFIG, "uniform", 0)
    workload.make_zipf_variant(folders[1], folders[0], 0)
    for folder in folders:
        for tokens in (2, 9):
            for index in range(2, workload.make_batches(folder, CONFIG, tokens, 0)):  # two of them are enough to emulate
                (folder / f"batch-{tokens}-{index:02}.npy").unlink()
            workload.save_checks(folder, tokens, workload.study(folder, tokens)[1])
    job = {"artifacts": pair, "workload": [str(folder) for folder in folders], "tokens": [2, 9]}
    place = Emulated(tmp_path / "emulated")
    result = place.measure(job | {"threads": 1, "rounds": 3, "min_ms": 0.1, "copies": 3})
    assert result["machine"] == {"processor": "emulated sm_90"}
    points = points_of(result, CONFIG)
    assert [(point.routing, point.tokens, len(point.candidate)) for point in points] == [
        (routing, tokens, 3) for routing in ("uniform", "zipf") for tokens in (2, 9)
    ]
    assert all(0 < error < 1e-2 for point in result["points"] for error in point["relative_l2"])

    checks = workload.study(folders[1], 2)[1]
    wrong = dataclasses.replace(checks, expected=[-each for each in checks.expected])
    workload.save_checks(folders[1], 2, wrong)
    result = place.measure(job | {"threads": 1, "rounds": 3, "min_ms": 0.1, "copies": 1})
    assert [len(point["seconds"][0]) for point in result["points"]] == [3, 3, 0, 0], "nothing is timed after what is wrong"
    with pytest.raises(CandidateError, match="the default is off by a relative L2 error of 2"):
        points_of(result, CONFIG)


def test_an_illegal_candidate_is_not_built(tmp_path: pathlib.Path) -> None:
    (built,) = Workshop(CONFIG, TARGET, tmp_path).build([Candidate("some", {"up_16.columns": 24})])
    assert isinstance(built, CandidateError)
    assert built.status == "rejected"
