"""The tuner: its search, its processes, what it records and decides. No test here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY, environment
from test_records import decision, elsewhere, line, put

import moegen
from moegen import artifact as artifacts
from moegen import choices, cli, plan, records
from moegen.bench import workload
from moegen.errors import CandidateError, MeasureError, PlaceLost
from moegen.report import readings
from moegen.target import host_arch
from moegen.toolchain import cxx
from moegen.tune import processes, processors, session, times, verdicts
from moegen.tune.journal import Journal
from moegen.tune.places import Here, Places
from moegen.tune.search import Search
from moegen.tune.session import Request, judged, tune
from moegen.tune.space import Space
from moegen.tune.stand import Effort
from moegen.tune.times import Measured, points_of, ratio

CONFIG = moegen.MoEConfig(**TINY)
MCPU = "x86-64" if host_arch() == "x86_64" else None  # few kernels, which are quick to compile
TARGET = plan.plan(CONFIG, mcpu=MCPU).target


# ---------------------------------------------------------------- space and search


@pytest.mark.parametrize(("mcpu", "fewest"), [("znver5", 100), (None, 50)], ids=["znver5", "here"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", choices.REGIMES)
def test_every_candidate_is_legal(regime: str, dtype: str, mcpu: str | None, fewest: int) -> None:
    arch = "x86_64" if mcpu else None
    space = Space(dataclasses.replace(CONFIG, dtype=dtype), plan.plan(CONFIG, arch=arch, mcpu=mcpu).target, regime)
    assert space.default in space.candidates
    assert fewest < len(space.candidates) <= math.prod(map(len, space.knobs.values()))
    assert len({tuple(each.items()) for each in space.candidates}) == len(space.candidates)
    for candidate in space.candidates[:: len(space.candidates) // 7]:
        choices.check(space.config, space.target, space.choice(candidate))


def _cost(candidate: Mapping[str, int]) -> float:
    """Milliseconds of a made-up machine: a lead that fits, tasks that do not matter, two knobs that go together."""
    lead, burst, tile = (math.log2(candidate[name]) for name in ("lead", "burst", "tile"))
    return 10 + (lead - 6) ** 2 + 0.5 * (burst - 3) ** 2 + 0.8 * abs(lead + tile - 9) + 0.3 * candidate["unroll"]


def test_the_search_finds_what_is_good() -> None:
    values = {
        "lead": (16, 32, 64, 128, 256, 512),
        "burst": (2, 4, 8, 16),
        "tile": (1, 2, 4, 8, 16),
        "unroll": (1, 2, 4),
        "tasks": (1, 2, 4),
    }
    candidates = [
        dict(zip(values, each, strict=True)) for each in np.stack(np.meshgrid(*values.values()), -1).reshape(-1, 5).tolist()
    ]
    assert len(candidates) == 1080
    default = {"lead": 16, "burst": 16, "tile": 1, "unroll": 4, "tasks": 1}
    best = min(map(_cost, candidates))
    for seed in range(2):
        search, picked = Search(candidates, default, seed), []
        while len(picked) < 64:
            for candidate in search.next(min(8, 64 - len(picked))):
                assert candidate not in picked
                picked.append(candidate)
                search.learn(
                    candidate, None if candidate["unroll"] == 4 and candidate["burst"] == 2 else _cost(candidate) / _cost(default)
                )
        assert min(map(_cost, picked)) <= 1.03 * best
        finalists = search.best(3)
        assert all(candidate in picked for candidate in finalists)
        assert min(map(_cost, finalists)) <= 1.03 * best
        again = Search(candidates, default, seed)
        assert again.next(5) == picked[:5]


def test_the_search_ends() -> None:
    candidates = [{"a": a, "b": b} for a in (1, 2, 3) for b in (1, 2)]
    search, picked = Search(candidates, {"a": 1, "b": 1}, 0), []
    while batch := search.next(4):
        picked += batch
        for candidate in batch:
            search.learn(candidate, 1.0)
    assert sorted(map(str, picked)) == sorted(str(each) for each in candidates[1:]), "the default is known"
    search.learn({"a": 9, "b": 9}, 0.1)


# ---------------------------------------------------------------- what times say


def _measured(tokens: int, factor: float, rounds: int = 24, noise: float = 0.01, routing: str = "uniform") -> Measured:
    rng = np.random.default_rng(tokens)
    states = np.exp(rng.normal(0, 0.3, rounds))  # the same for both layers in a round
    default, candidate = (states * np.exp(rng.normal(0, noise, rounds)) for _ in range(2))
    return Measured(routing, tokens, tuple(default * 1e-3), tuple(candidate * factor * 1e-3))


def test_ratios_compare_rounds() -> None:
    found = ratio([_measured(1, 0.9), _measured(8, 0.8)])
    assert found.value == pytest.approx(math.sqrt(0.72), rel=0.01)
    assert 0.83 < found.low < found.value < found.high < 0.87


def test_a_winner_is_faster_beyond_the_noise_and_slower_nowhere() -> None:
    null = [0.99, 1.01]
    assert judged([_measured(1, 0.9), _measured(64, 1.0)], [1], null)[0]
    assert judged([_measured(1, 0.9), _measured(64, 1.05)], [1], null)[0] is False
    assert judged([_measured(1, 0.7), _measured(8, 1.1)], [1, 8], null)[1].endswith(
        "slower than the default at 8 tokens, uniform routing"
    )
    assert "within the noise" in judged([_measured(1, 0.97)], [1], [0.95, 1.05])[1]
    assert judged([_measured(1, 1.02)], [1], [0.95, 1.05])[1] == "it is not faster than the default"
    assert "within the noise" in judged([_measured(1, 0.9, noise=0.3)], [1], [1.0, 1.0])[1]


# ---------------------------------------------------------------- processes


TUNED = {"few": {"up.lead_lines": 32, "down.k_unroll": 2}, "some": {"tile_rows": 2}, "many": {"pass_rows": 16, "chunk_rows": 60}}


@pytest.fixture(scope="module")
def known_objects(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory, known_objects: pathlib.Path) -> pathlib.Path:
    """An artifact whose every choice comes from records."""
    logs = tmp_path_factory.mktemp("logs")
    put(logs, *(decision(f"id-{name}", name) | {"target": TARGET.slug, "knobs": knobs} for name, knobs in TUNED.items()))
    tuned = plan.plan(CONFIG, mcpu=MCPU, logs=logs)
    return moegen.build(tuned, out=tmp_path_factory.mktemp("store"), known_objects=known_objects).path


def test_a_tuned_artifact(default: pathlib.Path, known_objects: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = moegen.open_artifact(default)
    assert made.manifest["verified"] == "passed"
    assert {regime: record["id"] for regime, record in made.manifest["records"].items()} == {
        regime: f"id-{regime}" for regime in choices.REGIMES
    }
    assert made.manifest["knobs"]["expert_up"]["few"]["lead_lines"] == 32
    assert [regime["tile_rows"] for regime in made.manifest["regimes"]][1] == 2
    assert made.manifest["tiling"]["chunk_rows"] == 60
    shown = CliRunner().invoke(cli.main, ["inspect", str(default)]).output
    for regime in choices.REGIMES:
        assert re.search(
            rf"tuned: {regime} by record id-{regime}, \d+ \w+ old, time less: T=1 uniform 10.0 % \(8.0 to 12.0\)", shown
        )
    own = choices.values(choices.default(CONFIG, TARGET), "few")["down.lead_lines"]
    assert f"expert_down: few.k_unroll=2, few.lead_lines={own}" in shown

    before = {path.name for path in known_objects.iterdir()}
    space = Space(CONFIG, TARGET, "few")
    moegen.build(space.plan({**space.default, **TUNED["few"]}), out=tmp_path, verify=False, known_objects=known_objects)
    added = {path.name.partition("-")[0] for path in known_objects.iterdir() if path.name not in before}
    assert added == {"host"}, "the kernels are those that were compiled before"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Workloads of both routings with tokens and what to expect of them."""
    base = tmp_path_factory.mktemp("workload")
    workload.make(base / "uniform", CONFIG, "uniform", 0)
    workload.make_zipf_variant(base / "zipf", base / "uniform", 0)
    for folder in (base / "uniform", base / "zipf"):
        workload.make_batches(folder, CONFIG, 2, 0)
        workload.save_checks(folder, 2, workload.study(folder, 2)[1])
    return [str(base / "uniform"), str(base / "zipf")]


def _job(default: pathlib.Path, candidate: pathlib.Path, folders: Sequence[str]) -> dict[str, Any]:
    settings = {"tokens": [2], "threads": 1, "rounds": 3, "min_ms": 0.1, "copies": 2}
    return {"artifacts": [str(default), str(candidate)], "workload": list(folders), **settings}


BAD = r"""
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
struct Any { int32_t kind; uint32_t more; int64_t value; };
static int give(struct Any* r, int64_t value) { r->kind = 1; r->more = 0; r->value = value; return 0; }
#define GIVEN void* self, const struct Any* values, int32_t count, struct Any* result
#define FINE(name) int __tvm_ffi_moe_##name(GIVEN) { return give(result, 64); }
FINE(profile) FINE(route) FINE(experts) FINE(workspace_bytes) FINE(pack) FINE(pool) FINE(pool_free)
int __tvm_ffi_moe_forward(GIVEN) { BODY; return give(result, 0); }
"""


@pytest.fixture
def candidate(default: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """A candidate whose library does this when it is called."""

    def make(body: str) -> pathlib.Path:
        folder = tmp_path / default.name
        shutil.copytree(default, folder)
        (tmp_path / "bad.c").write_text(BAD.replace("BODY", body))
        subprocess.run([*cxx(), "-x", "c", "-shared", "-fPIC", str(tmp_path / "bad.c"), "-o", str(folder / "moe.so")], check=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        artifacts.seal(folder, manifest)
        return folder

    return make


def test_measuring(default: pathlib.Path, folders: list[str], tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy" / default.name
    shutil.copytree(default, copy)
    result = Here(tmp_path).measure(_job(default, copy, folders))
    points = points_of(result, CONFIG)
    assert [(point.routing, point.tokens, len(point.default)) for point in points] == [("uniform", 2, 3), ("zipf", 2, 3)]
    assert all(point["relative_l2"][0] == point["relative_l2"][1] > 0 for point in result["points"])
    again = points_of(Here(tmp_path).measure(_job(default, copy, folders)), CONFIG)
    both = times.merged([points, again])
    assert [len(point.candidate) for point in both] == [6, 6]
    router = [np.load(pathlib.Path(folder) / "router.weight.npy") for folder in folders]
    assert not np.array_equal(*router), "the routings differ"


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        ("abort()", "runtime", "crashed with SIGABRT"),
        ("kill(getpid(), 9)", "runtime", "crashed with SIGKILL"),
        ("exit(7)", "runtime", "exit code 7"),
        ("for (;;) sleep(1)", "timeout", "did not end within 1 s"),
        ("(void)0", "wrong", "relative L2 error of inf at 2 tokens, uniform routing"),
    ],
    ids=["abort", "kill", "exit", "hang", "wrong"],
)
def test_a_bad_candidate_costs_one_trial(
    body: str, status: str, what: str, default: pathlib.Path, candidate: Any, folders: list[str], tmp_path: pathlib.Path
) -> None:
    made = candidate(body)
    with pytest.raises(CandidateError, match=what) as failed:
        points_of(
            Here(tmp_path, limit_seconds=1 if status == "timeout" else 60).measure(_job(default, made, folders)),
            CONFIG,
        )
    assert failed.value.status == status
    assert not processes._running


def test_what_a_process_started_ends_with_it(tmp_path: pathlib.Path) -> None:
    script = "import subprocess, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True)"
    script += "; print(p.pid, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    processes.end(process.pid)
    assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()
    _gone(grandchild)


def _gone(pid: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            if "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.05)
                continue
        return
    raise AssertionError(f"process {pid} is still there")


class Somewhere:
    """A place that answers, or is lost."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def measure(self, job: Any) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"points": answer}


def test_a_lost_place_costs_one_more_try() -> None:
    places = Places([Somewhere(PlaceLost("gone")), Somewhere(1, 2, CandidateError("crash", "runtime"), 3)])
    assert [places.measure({})["points"] for _ in range(2)] == [1, 2]
    assert places.count == 1
    with pytest.raises(CandidateError, match="crash"):
        places.measure({})
    assert places.measure({})["points"] == 3, "a place is not lost with a candidate"
    places = Places([Somewhere(PlaceLost("gone")), Somewhere(PlaceLost("gone, too"))])
    with pytest.raises(CandidateError, match="two places were lost with it: gone, too"):
        places.measure({})
    with pytest.raises(MeasureError, match=r"no place to measure at is left \(gone, too\)"):
        places.measure({})


def test_the_last_place_is_asked_again() -> None:
    """Its server may be there again; where it is not, that is not the candidate's doing."""
    places = Places([Somewhere(PlaceLost("cut"), 1, PlaceLost("gone"), PlaceLost("and stays away"))])
    assert places.measure({})["points"] == 1
    assert places.count == 1
    with pytest.raises(MeasureError, match=r"no place to measure at is left \(and stays away\)") as ended:
        places.measure({})
    assert not isinstance(ended.value, CandidateError)


def test_places_measure_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)

    class Meets:
        def measure(self, job: Any) -> dict[str, Any]:
            meeting.wait()
            return {"points": []}

    places = Places([Meets(), Meets()])
    assert list(processes.in_parallel(places.measure, [{}] * 4, places.count)) == [{"points": []}] * 4


# ---------------------------------------------------------------- runs


class Workshop:
    def remove(self, artifact: pathlib.Path) -> None:
        pass


class FakeStand:
    """Candidates' times by a formula; what is asked for is counted."""

    config, target, threads, seed, effort = CONFIG, TARGET, 1, 0, Effort()
    processor = plan.provenance().processor
    facts = processors.here().facts

    def __init__(self, factor: Callable[[Mapping[str, int]], float], fails: Mapping[int, CandidateError] | None = None) -> None:
        self.factor, self.fails, self.workshop = factor, fails or {}, Workshop()
        self.built: list[Mapping[str, int]] = []
        self.stop_after = 10**6

    def tokens(self, regimes: Sequence[str]) -> list[int]:
        return list(dict.fromkeys(tokens for regime in regimes for tokens in choices.tokens_of(CONFIG, regime)))

    def copy_of_default(self) -> pathlib.Path:
        return pathlib.Path("-1")

    def build(self, regime: str, candidates: Sequence[Mapping[str, int]]) -> list[pathlib.Path | CandidateError]:
        if len(self.built) >= self.stop_after:
            raise KeyboardInterrupt
        first = len(self.built)
        self.built += candidates
        return [self.fails.get(first + n, pathlib.Path(str(first + n))) for n in range(len(candidates))]

    def measure(self, artifact: pathlib.Path, regimes: Sequence[str], processes: int = 1) -> list[Measured]:
        factor = self.factor(self.built[int(str(artifact))]) if str(artifact) != "-1" else 1.0
        return [_measured(tokens, factor, 12 * processes, 0.004) for tokens in self.tokens(regimes)]

    def measure_each(self, made: Sequence[pathlib.Path | CandidateError], regime: str) -> Iterator[list[Measured] | CandidateError]:
        yield from (each if isinstance(each, CandidateError) else self.measure(each, [regime]) for each in made)


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeStand], None]:
    def use(stand: FakeStand) -> None:
        for module in (session, verdicts):
            monkeypatch.setattr(module, "open_stand", lambda *_, **__: contextlib.nullcontext(stand))

    return use


def _request(logs: pathlib.Path, **others: Any) -> Request:
    usual: dict[str, Any] = {"regimes": ("few",), "trials": 20, "threads": 1, "logs": logs}
    return Request(**{"config": CONFIG, "target": TARGET} | usual | others)


def _lines(logs: pathlib.Path, regime: str = "few") -> list[Mapping[str, Any]]:
    found = records.read(records.file_of(logs, TARGET.slug, records.layer_of(CONFIG), regime))
    assert not found.damaged
    return list(found.lines)


def _leads(candidate: Mapping[str, int]) -> float:
    return 0.8 if candidate["up.lead_lines"] == 32 else 1.0 + candidate["down.lead_lines"] / 1e4


def test_a_run(standing: Any, tmp_path: pathlib.Path) -> None:
    standing(FakeStand(_leads, {3: CandidateError("a reason", "compile"), 5: CandidateError("it hangs", "timeout")}))
    (decided,) = tune(_request(tmp_path))
    assert decided["better"]
    assert decided["knobs"]["up.lead_lines"] == 32
    assert decided["ratio"] == pytest.approx(0.8, rel=0.02)
    assert {point["tokens"] for point in decided["points"]} == set(FakeStand(_leads).tokens(choices.REGIMES))
    lines = _lines(tmp_path)
    assert [each["kind"] for each in lines] == ["null", *["trial"] * 20, "decision"]
    trials = lines[1:-1]
    assert [each["trial"] for each in trials] == list(range(20))
    assert decided["trials"] == {"correct": 18, "compile": 1, "timeout": 1}
    assert (trials[3]["status"], trials[3]["reason"], trials[3]["seconds"]) == ("compile", "a reason", None)
    right = trials[0]
    assert len(right["points"][0]["samples"][1]) == 12
    assert {"seed", "threads", "memory_bytes", "versions", "provenance", "created", "trial_seconds", "band"} <= set(right)
    tuned = plan.plan(CONFIG, mcpu=MCPU, logs=tmp_path)
    assert list(tuned.records) == ["few"]
    assert tuned.records["few"]["id"] == decided["id"]
    assert tuned.knobs["expert_up"].few.lead_lines == 32
    found = readings.read([records.file_of(tmp_path, TARGET.slug, records.layer_of(CONFIG), "few")])
    assert [trial["trial"] for trial in found.tunings[0].trials] == list(range(20))


def test_a_gain_that_is_luck_changes_nothing(standing: Any, tmp_path: pathlib.Path) -> None:
    standing(FakeStand(lambda candidate: 1.0))
    (decided,) = tune(_request(tmp_path))
    assert not decided["better"]
    assert plan.plan(CONFIG, mcpu=MCPU, logs=tmp_path).records == {}


def test_a_run_goes_on_where_it_was(standing: Any, tmp_path: pathlib.Path) -> None:
    first = FakeStand(_leads)
    first.stop_after = 8
    standing(first)
    with pytest.raises(KeyboardInterrupt):
        tune(_request(tmp_path))
    assert [each["kind"] for each in _lines(tmp_path)] == ["null", *["trial"] * 8]
    second = FakeStand(_leads)
    standing(second)
    tune(_request(tmp_path))
    trials = [each for each in _lines(tmp_path) if each["kind"] == "trial"]
    assert [each["trial"] for each in trials] == list(range(20))
    assert len({json.dumps(each["knobs"]) for each in trials}) == 20
    assert sum(each["kind"] == "null" for each in _lines(tmp_path)) == 1
    before = _lines(tmp_path)
    third = FakeStand(_leads)
    standing(third)
    (decided,) = tune(_request(tmp_path))
    assert (third.built, _lines(tmp_path), decided) == ([], before, before[-1]), "there was nothing left to do"


def test_other_schedules_begin_anew(standing: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heard(session.Watch):
        said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    standing(FakeStand(_leads))
    tune(_request(tmp_path, trials=4))
    monkeypatch.setattr(plan, "own_sources", lambda: "other")
    tune(_request(tmp_path, trials=4), Heard())
    assert "starting anew" in Heard.said[0]
    assert [each["trial"] for each in _lines(tmp_path) if each["kind"] == "trial"] == [0, 1, 2, 3] * 2
    found = readings.read([records.file_of(tmp_path, TARGET.slug, records.layer_of(CONFIG), "few")])
    assert len(found.tunings[0].trials) == 4


def test_exhaustive(standing: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = choices.space
    monkeypatch.setattr(choices, "space", lambda *given: {name: values[-2:] for name, values in real(*given).items()})
    stand = FakeStand(lambda candidate: 1.0 + candidate["tile_rows"] / 100)
    standing(stand)
    (decided,) = tune(_request(tmp_path, regimes=("many",), exhaustive=True))
    space = Space(CONFIG, TARGET, "many")
    built = [json.dumps(each) for each in stand.built]
    assert sorted(built) == sorted(json.dumps(each) for each in space.candidates if each != space.default)
    assert decided["reason"] == "no candidate was faster than the default"


def test_what_cannot_be_tuned(tmp_path: pathlib.Path) -> None:
    with pytest.raises(MeasureError, match="threads=100000 is more than"):
        tune(_request(tmp_path, threads=100000))
    with pytest.raises(MeasureError, match="regime='all' must be one of"):
        tune(_request(tmp_path, regimes=("all",)))
    with pytest.raises(moegen.TargetError, match="does not run on this machine"):
        tune(_request(tmp_path, target=dataclasses.replace(TARGET, arch="riscv64")))
    huge = dataclasses.replace(CONFIG, experts=4096, hidden=1 << 20, intermediate=1 << 20)
    with pytest.raises(MeasureError, match="are needed for 3 copies of the weights"):
        tune(_request(tmp_path, config=huge))
    assert not list(tmp_path.rglob("*.jsonl")), "nothing is left of a run without trials"


def test_verdicts(standing: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def far(name: str, **knobs: int) -> None:
        put(tmp_path, decision(name) | {"target": TARGET.slug, "knobs": knobs} | elsewhere())

    standing(FakeStand(_leads))
    far("good", **{"up.lead_lines": 32, "down.lead_lines": 32})
    assert plan.plan(CONFIG, mcpu=MCPU, logs=tmp_path).records == {}, "nothing is measured by surprise"
    assert [text.partition(":")[0] for text in verdicts.settle(CONFIG, TARGET, tmp_path)] == [
        "the tuning record for few rows per expert (from another processor) is used"
    ]
    assert plan.plan(CONFIG, mcpu=MCPU, logs=tmp_path).records["few"]["id"] == "good"
    assert list(verdicts.settle(CONFIG, TARGET, tmp_path)) == [], "once is enough"
    far("bad", **{"up.lead_lines": 64, "down.lead_lines": 192})
    assert list(verdicts.settle(CONFIG, TARGET, tmp_path)) == [], "something holds already"
    monkeypatch.setattr(plan, "own_sources", lambda: "other")
    (said,) = verdicts.settle(CONFIG, TARGET, tmp_path)
    assert "(from another processor and other schedules) is not used" in said
    assert "slower than the default" in said or "not faster" in said
    assert plan.plan(CONFIG, mcpu=MCPU, logs=tmp_path).records == {}


# ---------------------------------------------------------------- the command


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.main, ["tune", *arguments])


def test_list_export_import(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "package_folder", lambda name: tmp_path / "none")
    mine, theirs, file = (str(tmp_path / name) for name in ("mine", "theirs", "all.jsonl"))
    assert "there are no tuning records" in _run("--list", "--logs", mine).output
    refused = _run("--export", file, "--logs", mine)
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1)
    put(tmp_path / "mine", decision("a"), decision("b", "some", **elsewhere()), decision("c", "many", better=False))
    put(tmp_path / "mine", line("trial", "many", trial=0, status="correct", knobs={}, default_seconds=1.0))
    listed = _run("--list", "--logs", mine).output
    assert [word in listed for word in ("used here", "from another processor: measured when", "no better than the default")] == [
        True
    ] * 3
    assert "T=1 uniform 10.0 % (8.0 to 12.0)" in listed
    assert "wrote 4 records" in _run("--export", file, "--logs", mine).output
    assert "took over 4 records" in _run("--import", file, "--logs", theirs).output
    assert "4 were there already" in _run("--import", file, "--logs", theirs).output
    assert records.export(tmp_path / "theirs") == records.export(tmp_path / "mine")
    rows = json.loads(_run("--list", "--json", "--logs", theirs).output)
    assert {row["regime"]: row["id"] for row in rows} == {"few": "a", "some": "b", "many": "c"}

    text = pathlib.Path(file).read_text()
    for cut in (text[:-20], text.replace('"decision"', '"guess"', 1), text + "{}\n"):
        pathlib.Path(file).write_text(cut)
        refused = _run("--import", file, "--logs", str(tmp_path / "empty"))
        assert refused.exit_code == 1
        assert "is damaged" in refused.output
        assert " line " in refused.output
        assert not (tmp_path / "empty").exists(), "nothing is half imported"
    path = put(tmp_path / "mine", decision("d"))
    path.write_text(path.read_text()[:-5])
    assert f"damaged: {path} line 2: it is truncated" in _run("--list", "--logs", mine).output


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--experts", "2", "--top-k", "1", "--hidden", "16,32"], "one layer"),
        (["--experts", "2", "--top-k", "3", "--hidden", "16"], "top_k=3 must be between"),
        (["--regime", "all"], "'all' is not one of few, some, many"),
        (["--preset", "olmoe", "--rpc", "host:1"], "go together"),
        (["--import", "no-such-file"], "there is no file"),
        ([], "Missing --experts"),
    ],
)
def test_refusals(arguments: list[str], what: str) -> None:
    done = _run(*arguments)
    assert done.exit_code != 0
    assert what in done.output


@pytest.mark.slow
def test_interrupted_and_resumed(standing: Any, tmp_path: pathlib.Path) -> None:
    """The real command: Ctrl-C in the middle leaves whole lines and no processes, and the same command goes on."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "moegen", "tune", *sizes, "--regime", "few", "--threads", "1", "--logs", str(tmp_path)]
    command += ["--trials", "3", "--rounds", "3", *(["--mcpu", MCPU] if MCPU else [])]
    file = records.file_of(tmp_path, TARGET.slug, records.layer_of(CONFIG), "few")
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        for _ in range(1200):
            if (file.exists() and '"kind": "trial"' in file.read_text()) or running.poll() is not None:
                break
            time.sleep(0.05)
        children = processes._descendants(running.pid)
        # Programs that a script starts in the background are told to ignore Ctrl-C, and leave it to those that they start.
        number = signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT
        running.send_signal(number)
        said = running.communicate(timeout=30)[1]
    finally:
        processes.end(running.pid)
    assert running.returncode == 128 + number, said
    assert "the same command goes on" in said
    for child in children:
        _gone(child)
    before = _lines(tmp_path)
    count = sum(each["kind"] == "trial" for each in before)
    assert 1 <= count < 3
    with Journal(file):
        refused = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is being written by another run" in refused.stderr
    standing(FakeStand(_leads))
    tune(_request(tmp_path, trials=3))
    after = _lines(tmp_path)
    assert after[: len(before)] == before
    assert [each["kind"] for each in after[len(before) :]] == [*["trial"] * (3 - count), "decision"]
    assert {each["status"] for each in after if each["kind"] == "trial"} == {"correct"}
