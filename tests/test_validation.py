"""`moegen validate`: claims with thresholds, intervals that hold, and verdicts that fail, pass, or say that nothing was tested."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click.testing
import numpy as np
import pytest
from helpers import SMALL, run_python

import moegen
from moegen import arrays, runtime, verification
from moegen.bench import Effort, Subject, measure, workload
from moegen.cli import main
from moegen.validation import Progress, Scope, claims, fresh, intervals, others, page, proofs, run, speed, validate
from moegen.validation.claims import FAIL, NOT_TESTED, PASS, Finding, judge
from moegen.validation.layers import QUICK_SUBJECTS, SUBJECTS

Built = Callable[..., moegen.Artifact]
EFFORT = Effort(rounds=6, min_ms=0.2, most_seconds=0.2, patience_seconds=60.0, quiet_share=1e9)


@pytest.fixture
def scope(built: Built) -> Scope:
    """One layer that is there already, at one size."""
    made = built(**SMALL)
    return Scope(3.0, (Subject("small", made.config, artifact=made),), tokens=(4,), starts=1, effort=EFFORT, seed=1)


@pytest.fixture
def only_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes long to start."""
    monkeypatch.setattr(speed, "AGAINST", "numpy")
    monkeypatch.setattr(speed, "QUIET_SHARE", 1e9)  # machines that run tests are busy


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("rounds", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (17, 5, 13)])
def test_intervals_have_the_ranks_of_the_tables(rounds: int, low: int, high: int) -> None:
    found = intervals.ratio_interval(range(1, rounds + 1), [1.0] * rounds, 0.95)
    assert found is not None
    assert (found.low, found.high, found.median) == (low, high, (rounds + 1) / 2)
    assert found.confidence >= 0.95


def test_intervals_hold_the_median_as_often_as_they_say(rng: np.random.Generator) -> None:
    """Of a distribution that is far from normal."""
    inside, times = 0, 2000
    for ratios in rng.lognormal(0.0, 2.0, (times, 12)):
        found = intervals.ratio_interval(ratios.tolist(), [1.0] * 12, 0.95)
        assert found is not None
        inside += found.low <= 1.0 <= found.high
    deviation = math.sqrt(found.confidence * (1 - found.confidence) / times)
    assert abs(inside / times - found.confidence) < 5 * deviation


def test_few_rounds_give_no_interval() -> None:
    assert intervals.ratio_interval([2.0] * 5, [1.0] * 5, 0.95) is None
    assert intervals.ratio_interval([], [], 0.95) is None


# ---------------------------------------------------------------- claims


def test_claims_cover_what_the_layers_are_for() -> None:
    for subjects in (SUBJECTS, QUICK_SUBJECTS):
        configs = [subject.config for subject in subjects]
        assert len(subjects) == 3
        assert {c.gating for c in configs} == {"softmax", "sigmoid"}
        assert {c.dtype for c in configs} == {"float32", "bfloat16"}
        assert any(c.shared_intermediate for c in configs)
        assert any(c.low_bit for c in configs)
    every = claims.claims(SUBJECTS, (1, 256))
    assert len({(claim.layer, claim.name) for claim in every}) == len(every) == 3 * (12 + 6)
    assert all(claim.threshold.startswith(("at most", "at least", "above")) for claim in every)


@pytest.mark.parametrize(
    ("side", "value", "status"),
    [
        (claims.ABOVE, 1.01, PASS),
        (claims.ABOVE, 1.0, FAIL),
        (claims.AT_MOST, 1.0, PASS),
        (claims.AT_MOST, 1.01, FAIL),
        (claims.AT_LEAST, 0.99, FAIL),
        (claims.AT_MOST, math.inf, FAIL),
        (claims.AT_MOST, math.nan, FAIL),
        (claims.AT_MOST, None, NOT_TESTED),
    ],
)
def test_verdicts(side: str, value: float | None, status: str) -> None:
    claim = claims.Claim("layer", "name", "says", side, 1.0)
    assert judge(claim, {"name": Finding(value, "words")}, "").status == status
    json.dumps(judge(claim, {"name": Finding(value, "words")}, "").to_dict(), allow_nan=False)


def test_a_miss_on_a_busy_machine_is_no_failure() -> None:
    claim = claims.Claim("layer", "name", "says", claims.AT_MOST, 1.0)
    missed = judge(claim, {"name": Finding(2.0, "2 s", "other processes had 50% of the processors")}, "")
    assert (missed.status, missed.words) == (NOT_TESTED, "2 s, while other processes had 50% of the processors")
    assert judge(claim, {"name": Finding(0.5, "0.5 s", "other processes had 50%")}, "").status == PASS


def test_what_other_processes_take_is_seen() -> None:
    spin = "import time\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        watch = others.Others()
        time.sleep(0.4)
        share = watch.share()
        other.kill()
    assert share is not None
    assert share > 0.2 / len(os.sched_getaffinity(0))
    start, end, watch = time.monotonic(), time.process_time() + 0.3, others.Others()
    while time.process_time() < end:  # this process is no other
        pass
    processors = (time.monotonic() - start) * len(os.sched_getaffinity(0))
    assert (watch.share() or 0.0) <= 1.1 - 0.3 / processors


def test_without_a_finding_nothing_passes() -> None:
    verdict = judge(claims.Claim("layer", "name", "says", claims.AT_MOST, 1.0), {}, "interrupted")
    assert (verdict.status, verdict.words) == (NOT_TESTED, "interrupted")


# ---------------------------------------------------------------- speed


def contender(name: str, seconds: float, waits: tuple[float, ...] = (0.0,) * 8, **others: Any) -> dict[str, Any]:
    medians = [seconds * (1 + 0.01 * i) for i in range(8)]
    known = {"name": name, "status": "correct", "reason": None, "turn_medians": medians, "turn_waits": list(waits)}
    return known | {"seconds": {"median": seconds}, "roofline_fraction": 0.5} | others


def of(*contenders: dict[str, Any], absent: tuple[dict[str, str], ...] = ()) -> dict[str, Finding]:
    ceilings = {"flops_per_s": 1e9, "read_bytes_per_s": 1e9, "kind": "fma"}
    point = {"tokens": 1, "contenders": list(contenders), "roofline_seconds": 0.8, "ceilings": ceilings}
    return speed.findings({"points": [point], "absent": list(absent)})


def test_the_best_of_a_library_decides() -> None:
    found = of(
        contender("moegen", 1.0), contender("torch-loop", 9.0), contender("torch-onednn", 0.9), contender("numpy-grouped", 2.0)
    )
    assert found["torch_1"].value == pytest.approx(0.9)
    assert "torch-onednn" in found["torch_1"].words
    assert found["numpy_1"].value == pytest.approx(2.0)
    assert found["roofline_1"].value == pytest.approx(0.8 / 1.035)


def test_what_is_not_there_is_not_tested() -> None:
    found = of(contender("moegen", 1.0), absent=({"name": "torch-loop", "reason": "torch not installed"},))
    assert found["torch_1"].value is None
    assert "torch not installed" in found["torch_1"].words
    wrong = contender("torch-loop", 5.0, status="wrong", reason="wrong: relative L2 error 1", turn_medians=[], turn_waits=[])
    assert of(contender("moegen", 1.0), wrong)["torch_1"].value is None
    lost = contender("moegen", 1.0, status="failed", reason="crashed", turn_medians=[], turn_waits=[])
    assert math.isnan(of(lost, contender("torch-loop", 5.0))["torch_1"].value or 0.0)


def test_disturbed_rounds_do_not_count() -> None:
    busy = (0.0,) * 3 + (0.5,) * 5
    found = of(contender("moegen", 1.0), contender("torch-loop", 5.0, busy))
    assert found["torch_1"].value is None
    assert "8 rounds, 5 of them disturbed" in found["torch_1"].words
    assert of(contender("moegen", 1.0, (0.5,) * 8))["roofline_1"].value is None
    assert measure.quiet([0.0, 0.2, None], [0.0, 0.0, 0.05], 0.1) == [0, 2]


# ---------------------------------------------------------------- proofs


def test_dependence_on_the_batch_is_noticed(built: Built, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(**SMALL)
    workload.make(tmp_path / "weights", made.config, "uniform", 1)
    good = proofs.invariance(made, tmp_path / "weights", 1)
    assert {name: finding.value for name, finding in good.items()} == dict.fromkeys(
        ("threads", "callers", "batch", "nan", "empty"), 0
    )
    honest = runtime.Layer.__call__

    def broken(self: runtime.Layer, x: Any) -> Any:
        y = honest(self, x)
        if len(y.data) == 1 or self.threads == 3:
            y.data[...] = -y.data
        if np.isnan(arrays.to_float32(x)).any():
            y.data[...] = 0
        return y

    monkeypatch.setattr(runtime.Layer, "__call__", broken)
    bad = proofs.invariance(made, tmp_path / "weights", 1)
    assert all((bad[name].value or 0) > 0 for name in ("threads", "batch", "nan"))


def test_new_processes_have_no_compiler(built: Built, tmp_path: pathlib.Path) -> None:
    made = built(**SMALL)
    workload.make(tmp_path / "weights", made.config, "uniform", 1)
    said, found = fresh.starts(made, tmp_path / "weights", 1, 1)
    assert found["alone"].value == 0
    assert said[0]["load_seconds"] == found["load"].value > 0
    workload.make(tmp_path / "others", moegen.MoEConfig(**{**SMALL, "hidden": 32}), "uniform", 1)
    _, broken = fresh.starts(made, tmp_path / "others", 1, 1)
    assert broken["alone"].value == 1
    assert "WeightsError" in broken["alone"].words
    assert "load" not in broken


# ---------------------------------------------------------------- the whole


@pytest.mark.usefixtures("only_numpy")
def test_a_validation_from_the_command_line(scope: Scope, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("moegen.validation.scope.quick", lambda minutes, seed: scope)
    monkeypatch.setattr(claims, "FIRST_CALL_SECONDS", 60.0)
    monkeypatch.setattr(claims, "LOAD_SECONDS", 60.0)
    monkeypatch.setattr(claims, "LEAST_OF_ROOFLINE", 0.0)
    monkeypatch.setattr(claims, "LEAST_RATIO", 0.0)
    out = tmp_path / "out"
    done = click.testing.CliRunner().invoke(main, ["validate", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    document = json.loads((out / "validation.json").read_text())
    status = {verdict["name"]: verdict["status"] for verdict in document["verdicts"]}
    assert status.pop("build") == NOT_TESTED
    assert status.pop("torch_4") == NOT_TESTED
    assert set(status.values()) == {PASS}
    assert f"{len(status)} pass, 0 fail, 2 not tested" in done.stdout
    html = (out / page.PAGE).read_text(encoding="utf-8")
    assert f"{len(status)} pass, 0 fail, 2 not tested" in html
    assert "numpy-grouped" in html
    for name in ("ratios.png", "errors.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f'href="{name}"' in html
    assert {entry["contender"] for entry in document["layers"][0]["ratios"]} == {"numpy-naive", "numpy-grouped"}
    assert json.loads((out / "bench.json").read_text())["runs"][0]["points"][0]["tokens"] == 4


class Interrupted(Progress):
    """Ctrl-C when a stage begins."""

    def __init__(self, at: str) -> None:
        self.at = at

    def stage(self, what: str) -> None:
        if what.startswith(self.at):
            raise KeyboardInterrupt


def test_an_interrupt_keeps_what_there_is(scope: Scope, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    validate(scope, tmp_path, Interrupted("bit by bit"))
    document = json.loads((tmp_path / "validation.json").read_text())
    status = {verdict["name"]: verdict["status"] for verdict in document["verdicts"]}
    assert document["interrupted"]
    assert status["relative_l2"] == PASS
    assert status["threads"] == status["numpy_4"] == NOT_TESTED
    assert "interrupted before the end" in (tmp_path / page.PAGE).read_text(encoding="utf-8")


def test_a_claim_that_fails_says_so(scope: Scope, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(verification.RELATIVE_L2, "float32", 1e-12)
    document = validate(scope, tmp_path, Interrupted("bit by bit"))
    failures = [verdict["name"] for verdict in document["verdicts"] if verdict["status"] == FAIL]
    assert failures == ["relative_l2"]
    assert run.failed(document)


def test_what_takes_too_long_is_ended(scope: Scope, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(proofs, "numerics", lambda *given: time.sleep(60))
    monkeypatch.setattr(run, "_PROOF_SECONDS", 0.0)
    start = time.monotonic()
    document = validate(dataclasses.replace(scope, minutes=(run._PAGE_SECONDS + 1) / 60), tmp_path)
    assert time.monotonic() - start < 50
    assert any("it took longer than there was time" in what for what in document["left_out"])
    assert {verdict["status"] for verdict in document["verdicts"]} == {NOT_TESTED}


def test_what_there_is_no_time_for_is_named(scope: Scope, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    document = validate(dataclasses.replace(scope, minutes=1e-3), tmp_path)
    assert {verdict["status"] for verdict in document["verdicts"]} == {NOT_TESTED}
    assert any(what.startswith("proof of small") for what in document["left_out"])
    with pytest.raises(moegen.MoegenError, match="minutes=0 must be positive"):
        validate(dataclasses.replace(scope, minutes=0), tmp_path)


def test_all_thresholds_can_be_read_without_measuring() -> None:
    done = click.testing.CliRunner().invoke(main, ["validate", "--claims"])
    assert done.exit_code == 0
    assert "faster than torch's best at T=256" in done.stdout


def test_claims_are_listed_where_nothing_can_be_drawn() -> None:
    done = run_python("import sys; sys.modules['matplotlib'] = None; from moegen.cli import main; main(['validate', '--claims'])")
    assert done.returncode == 0, done.stderr
    assert "faster than torch's best at T=256" in done.stdout
