"""Tuning records: what is read and what is passed over, which of them hold, and what they make of a plan."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from moegen.schedules import llvm

import moegen
from moegen import choices, plan, records
from moegen.choices import REGIMES
from moegen.errors import RecordError, ScheduleError
from moegen.plan import provenance
from moegen.tune.journal import Journal
from moegen.tune.journal import os as journal_os

CONFIG = moegen.MoEConfig(**TINY)
TARGET = plan.plan(CONFIG).target
KNOBS = {"few": {"up.lead_lines": 32}, "some": {"tile_rows": 2}, "many": {"pass_rows": 56, "chunk_rows": 84}}


def line(kind: str, regime: str = "few", **others: Any) -> dict[str, Any]:
    """A line as `moegen tune` writes it, but for what nobody reads."""
    common = {
        "schema_version": 1,
        "kind": kind,
        "regime": regime,
        "layer": records.layer_of(CONFIG),
        "target": TARGET.slug,
        "created": "2026-01-01T00:00:00+00:00",
        "provenance": dataclasses.asdict(provenance()),
    }
    return common | others


def decision(name: str = "first", regime: str = "few", better: bool = True, **others: Any) -> dict[str, Any]:
    """A decision with one point."""
    point = {"tokens": 1, "routing": "uniform", "ratio": 0.9, "band": [0.88, 0.92]}
    rest = {"null": {"ratio": 1.0, "band": [0.99, 1.01]}, "trials": {"correct": 3}, "reason": "10.0 % less time than the default"}
    return line("decision", regime, id=name, better=better, knobs=KNOBS[regime], points=[point], own_tokens=[1], **rest) | others


def elsewhere(**fields: str) -> dict[str, Any]:
    """The provenance of a line from another place."""
    return {"provenance": dataclasses.asdict(provenance()) | (fields or {"processor": "another"})}


def put(folder: pathlib.Path, *lines: dict[str, Any]) -> pathlib.Path:
    """Adds lines to their files; returns the last one's."""
    for each in lines:
        path = records.file_of(folder, each["target"], each["layer"], each["regime"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(each) + "\n")
    return path


@pytest.fixture
def curated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Records that come with moegen."""
    folder = tmp_path / "curated"
    monkeypatch.setattr(records, "package_folder", lambda name: folder)
    return folder


# ---------------------------------------------------------------- places


def test_where_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("MOEGEN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGEN_LOGS", str(tmp_path / "logs"))
    assert records.user_folder() == tmp_path / "logs"
    assert records.user_folder("given") == pathlib.Path("given")
    monkeypatch.delenv("MOEGEN_LOGS")
    assert records.user_folder() == tmp_path / "store-tuning"


def test_different_layers_have_different_files() -> None:
    base = moegen.MoEConfig(**TINY | {"experts": 4, "shared_intermediate": 4})
    others: dict[str, Any] = {
        "experts": 8, "top_k": 2, "hidden": 32, "intermediate": 32, "dtype": "float16", "activation": "silu", "expert_bias": True,
        "shared_intermediate": 8, "weight_on_input": True, "capacity_factor": 1.5, "weight_dtype": "int8",
    }  # fmt: skip
    names = {records.layer_name(records.layer_of(dataclasses.replace(base, **{name: value}))) for name, value in others.items()}
    assert len(names | {records.layer_name(records.layer_of(base))}) == len(others) + 1
    same = dataclasses.replace(base, gating="sigmoid", renormalize=False, router_bias=True)
    assert records.layer_of(same) == records.layer_of(base), "routing decides no kernel's work"


# ---------------------------------------------------------------- reading


def test_what_cannot_be_read_is_named_and_passed_over(tmp_path: pathlib.Path) -> None:
    good = [decision("a"), line("trial", trial=0, status="correct", knobs={}, default_seconds=1.0)]
    bad = [
        "{not json",
        '{"schema_version": 1, "kind": "trial", "x": NaN}',
        "[1, 2]",
        json.dumps(decision() | {"schema_version": 2}),
        json.dumps(decision() | {"kind": "guess"}),
        json.dumps(decision() | {"knobs": {"up.lead_lines": "many"}}),
        json.dumps(decision() | {"better": 1}),
        json.dumps(decision() | {"points": [{"tokens": 1, "routing": "zipf", "ratio": 0.0, "band": [1, 1]}]}),
        json.dumps(decision() | {"points": []}),
        json.dumps(decision() | {"layer": {"experts": 2}}),
        json.dumps(decision() | {"layer": records.layer_of(CONFIG) | {"dtype": "../../float32"}}),
        json.dumps(decision() | {"target": "../../elsewhere"}),
        json.dumps(decision() | {"regime": "all"}),
        json.dumps(good[1] | {"status": "fine"}),
        json.dumps({name: value for name, value in decision().items() if name != "provenance"}),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([json.dumps(good[0]), *bad, "", json.dumps(good[1])]) + "\n" + json.dumps(good[0])[:70])
    found = records.read(path)
    assert found.lines == good
    assert [number for number, _ in found.damaged] == [*range(2, 17), 19]
    assert found.damaged[-1][1] == "it is truncated"
    assert all(reason for _, reason in found.damaged)
    assert records.read(tmp_path / "none.jsonl") == ([], [])
    with pytest.raises(RecordError, match="cannot read"):
        records.read(tmp_path)


WHOLE = decision()


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x),
    )
)
def test_nothing_that_is_json_surprises(value: Any) -> None:
    assert isinstance(records.fault(value), str)
    for name in WHOLE:
        assert isinstance(records.fault(WHOLE | {name: value}), str)


# ---------------------------------------------------------------- which of them hold


def chosen(logs: pathlib.Path) -> dict[str, str]:
    found = records.choose(CONFIG, TARGET.slug, REGIMES, provenance(), logs)
    return {regime: each["id"] for regime, each in found.used.items()}


def test_the_newest_and_the_users_first(tmp_path: pathlib.Path, curated: pathlib.Path) -> None:
    logs = tmp_path / "logs"
    put(curated, decision("curated"), decision("curated-some", "some"))
    assert chosen(logs) == {"few": "curated", "some": "curated-some"}
    put(logs, decision("old"), decision("new"))
    assert chosen(logs) == {"few": "new", "some": "curated-some"}
    put(logs, decision("none", better=False))
    assert chosen(logs) == {"some": "curated-some"}, "where the default stands, it stands"
    put(logs, decision("other", "some") | {"target": "llvm-other"}, decision("third", "few"))
    assert chosen(logs) == {"few": "third", "some": "curated-some"}


@pytest.mark.parametrize("field", ["processor", "compiler", "sources"])
def test_what_was_found_elsewhere_needs_a_verdict(field: str, tmp_path: pathlib.Path, curated: pathlib.Path) -> None:
    put(tmp_path, decision("far", **elsewhere(**{field: "another"})), decision("none", better=False, **elsewhere()))
    found = records.choose(CONFIG, TARGET.slug, REGIMES, provenance(), tmp_path)
    assert (found.used, [each["id"] for each in found.open]) == ({}, ["far"])
    put(tmp_path, line("verdict", decision="far", holds=True, **elsewhere()))
    assert chosen(tmp_path) == {}, "the verdict of another machine is none"
    put(tmp_path, line("verdict", decision="far", holds=True))
    assert chosen(tmp_path) == {"few": "far"}
    put(tmp_path, line("verdict", decision="far", holds=False))
    found = records.choose(CONFIG, TARGET.slug, REGIMES, provenance(), tmp_path)
    assert found == ({}, [])
    put(curated, decision("here"))
    assert chosen(tmp_path) == {"few": "here"}


def test_nothing_is_open_where_something_holds(tmp_path: pathlib.Path, curated: pathlib.Path) -> None:
    put(tmp_path, decision("far", **elsewhere()))
    put(curated, decision("here"))
    found = records.choose(CONFIG, TARGET.slug, REGIMES, provenance(), tmp_path)
    assert (list(found.used), found.open) == (["few"], [])


# ---------------------------------------------------------------- plans


def test_records_make_a_plan(tmp_path: pathlib.Path, curated: pathlib.Path) -> None:
    plain = plan.plan(CONFIG, logs=tmp_path)
    put(tmp_path, *(decision(f"id-{regime}", regime) for regime in REGIMES))
    tuned = plan.plan(CONFIG, logs=tmp_path)
    assert tuned.key != plain.key
    assert {regime: record["id"] for regime, record in tuned.records.items()} == {regime: f"id-{regime}" for regime in REGIMES}
    assert (plain.records, plan.plan(CONFIG, logs=tmp_path, tuned=False).key) == ({}, plain.key)
    assert tuned.knobs["expert_up"].few.lead_lines == tuned.knobs["shared_up"].few.lead_lines == 32
    assert tuned.knobs["expert_up"].others == plain.knobs["expert_up"].others
    assert tuned.knobs["expert_down"] == plain.knobs["expert_down"]
    assert [regime.tile_rows for regime in tuned.regimes] == [plain.regimes[0].tile_rows, 2, plain.regimes[0].tile_rows]
    assert tuned.geometry.tiling.chunk_rows == 84
    assert plan.plan(CONFIG, logs=tmp_path, tiling=plain.geometry.tiling).key == plain.key, "they are for the default tiling"


def test_a_plan_outlives_bad_records(tmp_path: pathlib.Path, curated: pathlib.Path) -> None:
    plain = plan.plan(CONFIG, logs=tmp_path)
    put(tmp_path, decision() | {"knobs": {"up.warp_size": 32}}, decision("some", "some") | {"knobs": {"tile_rows": 99}})
    path = put(tmp_path, decision("many", "many"))
    path.write_text(path.read_text()[:-9])
    again = plan.plan(CONFIG, logs=tmp_path)
    assert (again.key, again.records) == (plain.key, {})


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mcpu", ["znver5", "x86-64-v3", "x86-64"])
def test_one_line_or_three_do_the_same(dtype: str, mcpu: str) -> None:
    target = dataclasses.replace(TARGET, arch="x86_64")
    target = plan.compiler.resolve_target(mcpu=mcpu, arch="x86_64") if TARGET.arch == "x86_64" else target
    config = dataclasses.replace(CONFIG, dtype=dtype)
    choice = choices.default(config, target)
    lines = llvm.tiling.three_regimes(choice.tiling, choice.regimes)
    llvm.tiling.check_regimes(choice.tiling, lines)
    (whole,) = choice.regimes
    for rows in range(1, 400):
        own = next(each for each in lines if each.rows_up_to is None or rows <= each.rows_up_to)
        assert own.tile_rows == whole.tile_rows
        assert own.tasks_per_thread == whole.tasks_per_thread
        assert own.pass_rows == whole.pass_rows or rows <= own.pass_rows
    for regime in REGIMES:
        assert choices.chosen(choice, regime, choices.values(choice, regime)).knobs == choice.knobs


@given(st.data())
def test_what_is_chosen_is_what_is_there(data: st.DataObject) -> None:
    choice = choices.default(CONFIG, TARGET)
    wanted = {}
    for regime in data.draw(st.permutations(REGIMES)):
        space = choices.space(CONFIG, TARGET, choice, regime)
        wanted[regime] = {name: data.draw(st.sampled_from(values)) for name, values in space.items()}
        choice = choices.chosen(choice, regime, wanted[regime])
    assert {regime: choices.values(choice, regime) for regime in REGIMES} == wanted, "regimes do not touch one another"


@pytest.mark.parametrize(
    ("regime", "knobs", "what"),
    [
        ("few", {"up.lead_lines": -1}, "few.lead_lines=-1 must be between 0 and 1024"),
        ("some", {"down.burst_lines": 2000}, "others.burst_lines=2000 must be between"),
        ("few", {"up.k_unroll": 3}, "k_unroll=3 must be 1, 2 or 4"),
        ("few", {"up.k_unroll": 4, "up.burst_lines": 1}, "few.k_unroll=4 must divide"),
        ("some", {"tile_rows": 99}, "tile_rows=99 must be between"),
        ("many", {"pass_rows": 5000}, "pass_rows=5000 must be between"),
        ("many", {"tasks_per_thread": 0}, "tasks_per_thread=0 must be between 1 and 64"),
    ],
)
def test_illegal_choices_are_named(regime: str, knobs: dict[str, int], what: str) -> None:
    choice = choices.chosen(choices.default(CONFIG, TARGET), regime, knobs)
    with pytest.raises(ScheduleError, match=what):
        choices.check(CONFIG, TARGET, choice)
    with pytest.raises(ScheduleError):
        plan.plan_of(CONFIG, TARGET, choice)


# ---------------------------------------------------------------- journals


def test_one_writer_at_a_time(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "llvm-any" / "layer-few.jsonl"
    with Journal(path) as journal:
        journal.append(decision())
        with pytest.raises(RecordError, match="is being written by another run"):
            Journal(path)
    with Journal(path) as journal:
        assert journal.lines == [decision()]


def test_half_a_line_is_cut_off(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "layer-few.jsonl"
    path.write_text(json.dumps(decision("a")) + "\n" + json.dumps(decision("b"))[:50])
    with Journal(path) as journal:
        journal.append(decision("c"))
    assert [each["id"] for each in records.read(path).lines] == ["a", "c"]
    assert records.read(path).damaged == []


def test_nothing_is_left_of_no_lines(tmp_path: pathlib.Path) -> None:
    with Journal(tmp_path / "layer-few.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer-few.jsonl"
    with Journal(path) as journal:
        journal.append(decision("a"))
        before, real = path.read_bytes(), journal_os.write

        def half(file: int, data: bytes) -> int:
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return real(file, data[: len(data) - 50])

        monkeypatch.setattr(journal_os, "write", half)
        with pytest.raises(RecordError, match=r"\(No space left on device\): what was measured before is kept"):
            journal.append(decision("b"))
        assert path.read_bytes() == before
