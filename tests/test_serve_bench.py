"""Load tests of layers: what is sent, how steps are made up, what numbers come of it. No test depends on how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import environment
from hypothesis import given, settings
from hypothesis import strategies as st

import moegen
from moegen import cli
from moegen.arrays import HostArray
from moegen.bench import Subject
from moegen.bench.contenders import roster
from moegen.bench.contenders.roster import FamilyInfo
from moegen.errors import MeasureError
from moegen.serve_bench import (
    LayerTarget,
    Limits,
    Load,
    LoadRequest,
    Objective,
    Watch,
    arrivals,
    printing,
    request,
    results,
    serve_bench,
    sizes,
    summary,
    write_trace,
)
from moegen.serve_bench.batching import Batcher, kept_tokens
from moegen.serve_bench.outcomes import FAILED, OK, UNFINISHED, Outcome, Played

TINY = {"experts": 4, "top_k": 2, "hidden": 32, "intermediate": 32}
HIDDEN = 8
RIVALS = ("honest", "liar", "lazy", "crasher", "hanger", "raiser", "refuser")
Build = Callable[..., moegen.Artifact]


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7, 7),
        ("3-9", 3, 9),
        ("5,80", 5, 80),
        ("5*3, 80*1", 5, 80),
        ("lognormal:50,0.5", 1, 10**4),
        ("lognormal:50,2,20-90", 20, 90),
    ],
)
def test_sizes_are_drawn_within_their_range(text: str, least: int, most: int, rng: np.random.Generator) -> None:
    drawn = [sizes.parse("prompt", text).draw(rng) for _ in range(2000)]
    assert least <= min(drawn) <= max(drawn) <= most
    assert len(set(drawn)) > 1 or least == most


def test_sizes_follow_their_distribution() -> None:
    rng = np.random.default_rng(5)
    weighted = [sizes.parse("prompt", "5*3,80*1").draw(rng) for _ in range(4000)]
    assert 0.72 < np.mean(np.equal(weighted, 5)) < 0.78
    lognormal = [sizes.parse("prompt", "lognormal:200,0.8").draw(rng) for _ in range(4000)]
    assert 185 < np.median(lognormal) < 215
    assert 0.76 < np.std(np.log(lognormal)) < 0.84
    ranged = [sizes.parse("prompt", "1-3").draw(rng) for _ in range(3000)]
    assert min(np.bincount(ranged)[1:]) > 850, "both ends belong to a range"


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "2.5", "9-3", "0-4", "a", "5*x", "5*-1", "5*0", "5,,6", "lognormal:1", "lognormal:0,1", "lognormal:5,0",
     "lognormal:x,1", "lognormal:5,1,9-3", "9999999999", "5*inf", "5*nan", "1" * 5000],
)  # fmt: skip
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(MeasureError, match="prompt"):
        sizes.parse("prompt", text)


def test_a_size_out_of_reach_says_so() -> None:
    with pytest.raises(MeasureError, match="hardly ever falls into 90 to 91"):
        sizes.parse("prompt", "lognormal:2,0.1,90-91").draw(np.random.default_rng(0))


# ---------------------------------------------------------------- arrivals


def _gaps(load: Load) -> np.ndarray:
    return np.diff([0.0, *(p.at_s for p in load.planned() if p.at_s is not None)])


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_arrivals_have_their_rate(burstiness: float) -> None:
    gaps = _gaps(Load(rate_per_s=50, burstiness=burstiness, requests=8000, seed=3))
    assert len(gaps) == 8000
    deviation = burstiness**-0.5  # of a gamma distribution, relative to its mean; 1 for the exponential one
    assert abs(gaps.mean() * 50 - 1) < 4 * deviation / 8000**0.5
    assert abs(gaps.std() * 50 / deviation - 1) < 0.1
    if burstiness == 1:  # memoryless: a share of exp(-x) of the gaps is longer than x means
        for x in (0.5, 1, 2):
            assert abs(np.mean(gaps * 50 > x) - np.exp(-x)) < 0.025


def test_the_same_seed_gives_the_same_requests() -> None:
    load = Load(rate_per_s=5, requests=50, seed=9)
    assert list(load.planned()) == list(load.planned())
    assert list(load.planned()) != list(load.with_seed(10).planned())
    other = dataclasses.replace(load, prompt="7")
    assert [(p.at_s, p.output_tokens) for p in other.planned()] == [(p.at_s, p.output_tokens) for p in load.planned()]
    closed = [dataclasses.replace(p, at_s=None) for p in load.planned()]
    assert list(Load(concurrency=3, requests=50, seed=9).planned()) == closed


def test_a_duration_ends_an_open_loop() -> None:
    planned = list(Load(rate_per_s=100, duration_s=2.0, seed=1).planned())
    assert all(p.at_s is not None and p.at_s < 2.0 for p in planned)
    assert 140 < len(planned) < 260


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give a rate"),
        ({"rate_per_s": 1.0}, "nothing ends"),
        ({"rate_per_s": 0.0, "requests": 1}, "rate=0.0"),
        ({"rate_per_s": float("inf"), "requests": 1}, "give a concurrency instead"),
        ({"rate_per_s": float("nan"), "requests": 1}, "rate=nan"),
        ({"concurrency": 0, "requests": 1}, "concurrency=0"),
        ({"concurrency": 1, "requests": 0}, "requests=0"),
        ({"concurrency": 1, "duration_s": -1.0}, "duration=-1.0"),
        ({"rate_per_s": 1.0, "requests": 1, "burstiness": 0.0}, "burstiness=0.0"),
        ({"rate_per_s": 1.0, "requests": 1, "prompt": "x"}, "prompt='x'"),
        ({"rate_per_s": 1.0, "requests": 1, "output": "0"}, "output=0"),
        ({"rate_per_s": 1.0, "trace": "x.jsonl"}, "one of them"),
        ({"trace": "nowhere.jsonl"}, "cannot read the trace"),
        ({"rate_per_s": 1.0, "duration_s": 1e-9}, "no request comes within"),
    ],
)
def test_loads_that_cannot_be_sent(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MeasureError, match=re.escape(words)):
        arrivals.check(Load(**fields))


def test_a_trace_is_replayed(tmp_path: pathlib.Path) -> None:
    load = Load(rate_per_s=20, requests=30, seed=2)
    assert write_trace(tmp_path / "a.jsonl", load) == 30
    planned, again = list(load.planned()), list(Load(trace=str(tmp_path / "a.jsonl")).planned())
    first = planned[0].at_s or 0.0
    assert [(p.prompt_tokens, p.output_tokens) for p in again] == [(p.prompt_tokens, p.output_tokens) for p in planned]
    np.testing.assert_allclose([p.at_s for p in again], [(p.at_s or 0.0) - first for p in planned], atol=1e-5)
    assert len(list(Load(trace=str(tmp_path / "a.jsonl"), requests=4).planned())) == 4
    with pytest.raises(MeasureError, match="closed loop"):
        write_trace(tmp_path / "b.jsonl", Load(concurrency=1, requests=1))


def test_traces_of_mooncake_are_read(tmp_path: pathlib.Path) -> None:
    lines = [{"timestamp": at, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]} for at in (30000, 27000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    planned = list(Load(trace=str(tmp_path / "a.jsonl")).planned())
    assert [(p.index, p.at_s, p.prompt_tokens, p.output_tokens) for p in planned] == [(0, 0.0, 6758, 500), (1, 3.0, 6758, 500)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no requests"),
        ("{", "line 1 .* is not JSON"),
        ("[1]", "line 1 .* must be an object"),
        ('{"at_s": 0, "prompt_tokens": 3}', r"has no output_tokens \(nor output_length\)"),
        ('{"at_s": -1, "prompt_tokens": 3, "output_tokens": 1}', "at_s=-1"),
        ('{"at_s": "0", "prompt_tokens": 3, "output_tokens": 1}', "at_s='0'"),
        ('{"at_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens=0"),
        ('{"at_s": 0, "prompt_tokens": 2.5, "output_tokens": 1}', "prompt_tokens=2.5"),
        ('{"at_s": 0, "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens=True"),
        ('{"at_s": 1e999, "prompt_tokens": 1, "output_tokens": 1}', "at_s=inf"),
        ('{"at_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n{"at_s"', "line 2 .* is not JSON"),
    ],
)
def test_traces_that_are_malformed(text: str, words: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(MeasureError, match=words):
        arrivals.check(Load(trace=str(tmp_path / "a.jsonl")))


# ---------------------------------------------------------------- steps


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Doubling:
    """A layer that doubles; a step takes `seconds` and a tenth of that for each token."""

    def __init__(self, clock: Clock, seconds: float = 1.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.batches: list[np.ndarray] = []

    def __call__(self, x: HostArray, out: HostArray) -> None:
        self.batches.append(x.data.copy())
        np.multiply(x.data, 2, out=out.data)
        self.clock.now += self.seconds * (1 + 0.1 * len(x.data))


def _pool(rows: int = 64) -> HostArray:
    return HostArray(np.arange(rows * HIDDEN, dtype=np.float32).reshape(rows, HIDDEN), "float32")


def _played(load: Load, limits: Limits, seconds: float = 1.0, **options: Any) -> tuple[Played, list[Any], Doubling]:
    clock = Clock()
    layer = Doubling(clock, seconds)
    played, kept = Batcher(layer, _pool(), limits).play(load, clock=clock, sleep=clock.sleep, **options)
    return played, kept, layer


def test_prompts_are_cut_into_chunks_between_decodes(tmp_path: pathlib.Path) -> None:
    """Two requests at once, worked out by hand: steps of at most 4 tokens."""
    lines = [{"at_s": 0, "prompt_tokens": 3, "output_tokens": 3}, {"at_s": 0, "prompt_tokens": 6, "output_tokens": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    played, _, layer = _played(Load(trace=str(tmp_path / "a.jsonl")), Limits(4, 4))
    # 3 + 1 of the prompts; a decode and 3 of the second prompt; a decode and its last 2.
    assert [len(batch) for batch in layer.batches] == [4, 4, 3]
    first, second = played.outcomes
    np.testing.assert_allclose(first.token_s, [1.4, 2.8, 4.1])
    np.testing.assert_allclose(second.token_s, [4.1])
    assert (first.status, first.output_tokens, first.started_s, first.ended_s) == (OK, 3, 0.0, pytest.approx(4.1))
    assert second.started_s == 0.0
    pool = _pool().data
    rows = [*range(3), 997 % 64, 3, *(997 % 64 + np.arange(1, 4)), 4, *(997 % 64 + np.arange(4, 6))]
    np.testing.assert_array_equal(np.concatenate(layer.batches), pool[rows])
    assert played.facts["steps"] == 3
    assert played.facts["batch_tokens"] == 11
    assert played.facts["layer_seconds"] == pytest.approx(played.seconds) == pytest.approx(4.1)


def test_latencies_count_from_when_a_request_was_due() -> None:
    """A layer ten times too slow is charged for the wait: no coordinated omission."""
    load = Load(rate_per_s=1.0, requests=20, prompt="1", output="1")
    played, _, _ = _played(load, Limits(1, 1), seconds=10.0)
    due = [p.at_s for p in load.planned()]
    assert [o.due_s for o in played.outcomes] == due
    ended = (due[0] or 0.0) + 11.0 * np.arange(1, 21)
    np.testing.assert_allclose([o.ended_s for o in played.outcomes], ended, atol=0.03)  # naps of 0.02 s before the first
    np.testing.assert_allclose([o.latency_s for o in played.outcomes], ended - np.array(due), atol=0.03)
    assert all(o.first_token_s == o.latency_s for o in played.outcomes)


@pytest.mark.parametrize("open_loop", [False, True])
def test_a_concurrency_is_kept(open_loop: bool) -> None:
    load = Load(rate_per_s=100.0 if open_loop else None, concurrency=3, requests=30, prompt="1-5", output="1-4", seed=4)
    played, _, _ = _played(load, Limits(64, 64))
    assert all(o.status == OK for o in played.outcomes)
    running = [Outcome(o.index, o.started_s or 0.0, 0, 0, ended_s=o.ended_s) for o in played.outcomes]
    assert summary.most_in_flight(running) == 3
    assert summary.most_in_flight(played.outcomes) > 3 if open_loop else summary.most_in_flight(played.outcomes) == 3


def test_a_duration_ends_a_closed_loop() -> None:
    played, _, _ = _played(Load(concurrency=2, duration_s=10.0, prompt="2", output="3"), Limits(8, 8))
    assert all(o.status == OK and o.due_s < 10.0 for o in played.outcomes)
    assert played.seconds >= 10.0
    assert 4 <= len(played.outcomes) <= 8


def test_stopping_leaves_requests_unfinished() -> None:
    calls = iter(range(100))
    played, _, _ = _played(Load(concurrency=2, requests=50, prompt="4", output="4"), Limits(8, 8), stop=lambda: next(calls) == 5)
    assert played.interrupted
    assert [o.status for o in played.outcomes].count(UNFINISHED) == 2
    assert len(played.outcomes) < 50


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 8),
)
def test_steps_hold_what_they_should(asked: list[tuple[int, int]], tokens: int, active: int, concurrency: int) -> None:
    """Every row of every request goes through once and in order, no step is too large, and none is idle while there is work."""
    values = ",".join(f"{p}" for p, _ in asked), ",".join(f"{o}" for _, o in asked)
    load = Load(concurrency=concurrency, requests=len(asked), prompt=values[0], output=values[1], seed=tokens)
    limits = Limits(tokens, min(active, tokens))
    everything = frozenset(range(len(asked)))
    played, kept, layer = _played(load, limits, keep=everything)
    planned = list(load.planned())
    assert sum(len(batch) for batch in layer.batches) == sum(p.prompt_tokens + p.output_tokens - 1 for p in planned)
    assert all(1 <= len(batch) <= tokens for batch in layer.batches)
    for outcome, plan in zip(played.outcomes, planned, strict=True):
        assert outcome.status == OK
        assert outcome.output_tokens == len(outcome.token_s) == plan.output_tokens
        assert outcome.token_s == sorted(outcome.token_s)
    assert [one.index for one in kept] == sorted(everything)
    for one, plan in zip(kept, planned, strict=True):
        wanted = [(one.index * 997 + i) % 64 for i in kept_tokens(plan.prompt_tokens + plan.output_tokens - 1)]
        assert one.rows == wanted
        np.testing.assert_array_equal(one.outputs, 2 * _pool().data[wanted])


def test_limits_that_cannot_be_kept() -> None:
    with pytest.raises(MeasureError, match="active=9 requests do not fit into steps of batch_tokens=8"):
        Batcher(lambda x, out: None, _pool(), Limits(8, 9))
    with pytest.raises(MeasureError, match="batch_tokens=0"):
        Batcher(lambda x, out: None, _pool(), Limits(0, 1))


# ---------------------------------------------------------------- numbers


def _outcome(index: int, due: float, tokens: list[float], status: str = OK, kind: str = "") -> Outcome:
    made = Outcome(index, due, 10, len(tokens), due, tokens, tokens[-1] if tokens else due, len(tokens), status, kind)
    return dataclasses.replace(made, error=f"{kind}!") if kind else made


def test_a_summary_worked_out_by_hand() -> None:
    outcomes = [
        _outcome(0, 0.0, [1.0, 1.5, 2.5]),
        _outcome(1, 1.0, [5.0]),
        _outcome(2, 2.0, [], FAILED, "timeout"),
        _outcome(3, 3.0, [], FAILED, "HTTP 503"),
        _outcome(4, 3.0, [], FAILED, "timeout"),
        Outcome(5, 3.0, 10, 4),
    ]
    found = summary.summarise([Played(outcomes, 8.0)], Objective(ttft_s=2.0, tpot_s=0.75))
    assert (found["requests"], found["succeeded"], found["failed"], found["unfinished"]) == (6, 2, 3, 1)
    assert found["success_rate"] == 2 / 5
    assert found["failures"] == [
        {"kind": "timeout", "count": 2, "example": "timeout!"},
        {"kind": "HTTP 503", "count": 1, "example": "HTTP 503!"},
    ]
    assert (found["requests_per_s"], found["output_tokens_per_s"], found["tokens_per_s"]) == (2 / 8, 4 / 8, 24 / 8)
    assert found["goodput"] == {"requests_per_s": 1 / 8, "share": 1 / 5}
    assert found["latency"]["ttft"]["max"] == 4.0
    assert found["latency"]["ttft"]["p50"] == 2.5
    assert found["latency"]["tpot"] == summary.spread([0.75])
    assert found["latency"]["itl"]["count"] == 2
    assert found["latency"]["e2e"]["p95"] == pytest.approx(2.5 + 0.95 * 1.5)
    assert found["most_in_flight"] == 2
    assert summary.summarise([Played(outcomes, 8.0)], Objective(e2e_s=3.0))["goodput"]["share"] == 1 / 5
    assert summary.summarise([Played(outcomes, 8.0)], Objective())["goodput"] is None


def test_percentiles_of_few_samples_are_marked() -> None:
    assert summary.spread([]) is None
    assert summary.spread([1.0] * 19)["thin"] == ["p95", "p99"]  # type: ignore[index]
    assert summary.spread([1.0] * 20)["thin"] == ["p99"]  # type: ignore[index]
    assert summary.spread([1.0] * 99)["thin"] == ["p99"]  # type: ignore[index]
    assert summary.spread([1.0] * 100)["thin"] == []  # type: ignore[index]


def test_nothing_at_all_is_no_number() -> None:
    found = summary.summarise([Played([], 0.0)], Objective(e2e_s=1.0))
    assert found["success_rate"] is None
    assert found["requests_per_s"] is None
    assert set(found["latency"].values()) == {None}


def test_ratios_are_taken_round_by_round() -> None:
    ours = [Played([_outcome(0, 0.0, [s, 2 * s])], 2 * s) for s in (1.0, 3.0)]
    other = [Played([_outcome(0, 0.0, [s, 3 * s])], 3 * s) for s in (2.0, 3.0)]
    found = results.ratios(other, ours)
    assert found is not None
    assert found["seconds"] == {"median": 2.25, "least": 1.5, "most": 3.0}
    assert found["ttft_p50"]["median"] == 1.5
    assert found["tpot_p50"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    cut = [dataclasses.replace(one, interrupted=True) for one in other]
    assert results.ratios(cut, ours) is None


# ---------------------------------------------------------------- layers


@pytest.fixture(scope="module", autouse=True)
def contenders_without_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        yield


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roster.FAMILIES, "rivals", FamilyInfo("rivals", dict.fromkeys(RIVALS, "misbehaves")))


@pytest.fixture
def tiny(built: Build) -> Subject:
    artifact = built(**TINY)
    return Subject("tiny", artifact.config, artifact=artifact)


SMALL_LOAD = Load(concurrency=4, requests=12, prompt="1-40", output="1-8")


def test_a_layer_and_contenders_that_misbehave(tiny: Subject, rivals: None) -> None:
    target = LayerTarget(tiny, threads=1, against="rivals", limits=Limits(32, 8), patience_seconds=3)
    document = serve_bench(target, LoadRequest(SMALL_LOAD, warmup=1, rounds=2))
    document = json.loads(json.dumps(document))
    found = {entry["name"]: entry for entry in document["contenders"]}
    statuses = {name: entry["status"] for name, entry in found.items()}
    assert statuses == {
        "moegen": "correct", "honest": "correct", "liar": "wrong", "lazy": "wrong",
        "crasher": "failed", "hanger": "failed", "raiser": "failed",
    }  # fmt: skip
    assert document["absent"] == [{"name": "refuser", "reason": "has no time for this layer"}]
    assert "SIGSEGV" in found["crasher"]["reason"]
    assert "did not answer" in found["hanger"]["reason"]
    assert "cannot" in found["raiser"]["reason"]
    assert all(found[name]["summary"] is None for name, status in statuses.items() if status != "correct")
    own = found["moegen"]
    assert own["summary"]["requests"] == own["summary"]["succeeded"] == 24
    assert own["summary"]["output_tokens"] == sum(p.output_tokens for seed in (0, 1) for p in SMALL_LOAD.with_seed(seed).planned())
    assert [check["same_alone"] for check in own["checks"]] == [True, True]
    assert all(check["rows"] > 10 and check["relative_l2"] < 2e-5 for check in own["checks"])
    tokens = [[turn["facts"]["batch_tokens"] for turn in entry["turns"]] for entry in (own, found["honest"])]
    assert tokens[0] == tokens[1]
    assert own["ratio_to_moegen"] is None
    assert set(found["honest"]["ratio_to_moegen"]) == {"seconds", "ttft_p50", "tpot_p50", "e2e_p50", "e2e_p95"}
    text = "\n".join(printing.lines(document))
    assert re.search(r"liar +WRONG .*above", text)
    assert "few for P99" in text
    assert "P95 needs 20" in text
    _documented(document)


def _documented(value: Any) -> None:
    """Every field of a document is named where its schema is written down."""
    if isinstance(value, list):
        for item in value:
            _documented(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("config", "versions", "machine"):
                assert re.search(rf"\b{name}\b", results.__doc__ or ""), name
                _documented(item)


def test_a_layer_whose_rows_depend_on_the_batch_is_wrong(tmp_path: pathlib.Path) -> None:
    from moegen.bench import workload
    from moegen.bench.contenders.family import Family, Settings
    from moegen.serve_bench.layers import POOL_TOKENS
    from moegen.serve_bench.worker import Server

    workload.make(tmp_path, moegen.MoEConfig(**TINY), "uniform", 0)
    workload.make_batches(tmp_path, moegen.MoEConfig(**TINY), POOL_TOKENS, 0)
    family = Family(Settings(tmp_path, 1, ""))

    def apart(x: HostArray, out: HostArray) -> None:
        out.data[...] = x.data

    def mixed(x: HostArray, out: HostArray) -> None:
        out.data[...] = x.data + x.data.mean()

    family.calls = {"apart": apart, "mixed": mixed}
    handler = signal.getsignal(signal.SIGINT)
    limits, to = {"batch_tokens": 32, "active": 8}, str(tmp_path / "o")
    try:
        server = Server(family, lambda line: None)
        same = {name: server.play(name, SMALL_LOAD.to_dict(), None, limits, POOL_TOKENS, [0, 5], 60, to) for name in family.calls}
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [one["same_alone"] for one in same.values()] == [True, False]


def test_a_layer_with_capacity_is_not_compared() -> None:
    """What it drops depends on the batch, and so does an output."""
    from moegen.serve_bench.layers import Checked, Layers

    layers = types.SimpleNamespace(config=moegen.MoEConfig(**TINY, capacity_factor=1.0))
    kept = {"rows": [1], "same_alone": False, "outputs": np.zeros((1, 32))}
    assert Layers.check(layers, roster.OURS, kept) == Checked()  # type: ignore[arg-type]


def test_a_turn_that_takes_too_long_is_cut_off(tiny: Subject) -> None:
    load = Load(concurrency=2, duration_s=3600.0, prompt="4", output="4")
    (entry,) = serve_bench(LayerTarget(tiny, threads=1, most_seconds=0.3), LoadRequest(load))["contenders"]
    assert entry["turns"][0]["facts"]["cut_off"]
    assert not entry["turns"][0]["interrupted"]
    assert entry["summary"]["succeeded"] > 0


class Interrupting(Watch):
    """Sends this process the terminal's signal when some requests have ended."""

    def __init__(self) -> None:
        self.sent = False

    def ended(self, count: int) -> None:
        if count and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_keeps_what_was_measured(tiny: Subject, rivals: None) -> None:
    load = Load(rate_per_s=200.0, duration_s=3600.0, prompt="4", output="4")
    document = serve_bench(LayerTarget(tiny, threads=1, against="honest"), LoadRequest(load, rounds=3), Interrupting())
    assert document["interrupted"]
    (entry,) = document["contenders"]  # the other one had no turn yet
    assert entry["status"] == "correct"
    assert entry["turns"][0]["interrupted"]
    assert entry["summary"]["succeeded"] > 0
    assert any("interrupted" in note for note in document["notes"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"threads": 10**4}, "threads=10000"), ({"routing": "odd"}, "routing='odd'"), ({"against": "nobody"}, "unknown contender"),
     ({"most_seconds": 0.0}, "most_seconds"), ({"limits": Limits(4, 5)}, "active=5")],
)  # fmt: skip
def test_layers_that_cannot_be_measured(fields: dict[str, Any], words: str) -> None:
    subject = Subject("x", moegen.MoEConfig(**TINY))
    with pytest.raises((MeasureError, moegen.ConfigError), match=words):
        request.check(LayerTarget(subject, **fields), LoadRequest(SMALL_LOAD))


# ---------------------------------------------------------------- command


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.main, ["serve-bench", *map(str, arguments)])


def test_the_command_writes_results_and_a_picture(tiny: Subject, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    assert tiny.artifact is not None
    files = ("--json", tmp_path / "a.json", "--picture", tmp_path / "a.png")
    done = _run(tiny.artifact.path, "--rate", 500, "--requests", 30, "--output", "2", "--slo-e2e-ms", 1e6, "--threads", 1, *files)
    assert done.exit_code == 0, done.output
    document = results.read_document(tmp_path / "a.json")
    assert document["load"]["mode"] == "open"
    assert document["contenders"][0]["summary"]["goodput"]["share"] == 1.0
    assert re.search(r"moegen +30 +100%", done.output)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name a preset"),
        (["olmoe", "--preset", "mixtral"], "give one of them"),
        (["--url", "http://x/v1", "--experts", "4"], "leave out --experts"),
        (["--url", "http://x/v1", "olmoe"], "leave out olmoe"),
        (["olmoe", "--timeout", "3"], "--timeout is for servers"),
        (["--experts", "2,4", "--top-k", "1", "--hidden", "16"], "these are 2 layers"),
        (["olmoe", "--rate", "0"], "rate=0.0 must be"),
        (["olmoe", "--prompt", "9-1"], "empty range"),
        (["olmoe", "--json", "no/such/folder/a.json"], "there is no folder"),
        (["olmoe", "--picture", "/"], "it is a folder"),
        (["--url", "http://x/v1", "--extra-body", "[1]"], "must be an object"),
        (["olmoe", "--max-batch-tokens", "8", "--max-requests", "9"], "do not fit"),
    ],
)
def test_command_lines_that_make_no_sense(arguments: list[str], words: str) -> None:
    done = _run(*arguments)
    assert done.exit_code != 0
    assert words in " ".join(done.output.split())


def test_results_of_something_else_are_refused(tmp_path: pathlib.Path) -> None:
    for text, words in (("{", "not readable JSON"), ("[]", "does not hold"), ('{"kind": "moegen-serve-bench"}', "has schema None")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(MeasureError, match=words):
            results.read_document(tmp_path / "a.json")
