"""Counts per expert: exact, from many threads, in and out of files, to Prometheus and to a picture."""

from __future__ import annotations

import json
import math
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, run_python

import moegen
from moegen import reference
from moegen.errors import InputError, ReportError
from moegen.monitoring import ExpertLoad, measures
from moegen.monitoring.counts import MOST_MOMENTS, LayerCounts
from moegen.reference import random_weights


def counted(*counts: int, layer: object = "0", **options: Any) -> ExpertLoad:
    """A load that met expert e so many times."""
    load = ExpertLoad(**options)
    ids = np.repeat(np.arange(len(counts)), counts).reshape(-1, 1)
    load.update(ids, layer=layer, experts=len(counts))
    return load


# ---------------------------------------------------------------- numbers


def test_measures_of_known_distributions() -> None:
    even = counted(5, 5, 5, 5).summary()
    assert (even.entropy_bits, even.evenness, even.imbalance, even.variation, even.gini, even.dead) == (2, 1, 1, 0, 0, ())
    one = counted(0, 12, 0, 0).summary()
    assert (one.entropy_bits, one.evenness, one.imbalance, one.gini, one.busiest) == (0, 0, 4, 0.75, 1)
    assert one.variation == pytest.approx(math.sqrt(3))
    assert one.dead == (0, 2, 3)
    mixed = counted(1, 2, 1).summary()
    assert mixed.entropy_bits == pytest.approx(1.5)
    assert mixed.evenness == pytest.approx(1.5 / math.log2(3))
    assert mixed.gini == pytest.approx(1 / 6)


def test_gini_is_the_mean_difference(rng: np.random.Generator) -> None:
    """Its other definition: the mean absolute difference of all pairs, over twice the mean."""
    counts = rng.integers(0, 1000, 37)
    pairs = np.abs(counts[:, None] - counts[None, :]).mean() / (2 * counts.mean())
    assert measures.gini(counts) == pytest.approx(pairs)


def test_one_expert_and_none_chosen() -> None:
    assert counted(7).summary().evenness == 1.0
    load = ExpertLoad()
    load.update(np.zeros((0, 2), np.int32), experts=4)
    empty = load.summary()
    assert (empty.calls, empty.tokens, empty.choices, empty.entropy_bits, empty.imbalance, empty.busiest) == (
        1,
        0,
        0,
        None,
        None,
        None,
    )
    assert empty.dead == (0, 1, 2, 3)


def test_window_forgets_by_tokens() -> None:
    load = ExpertLoad(window_tokens=10)
    load.update(np.zeros((5, 1), int), experts=2)
    load.update(np.ones((20, 1), int))
    np.testing.assert_allclose(load.counts(recent=True), [5 * math.exp(-2), 20])
    assert load.counts().tolist() == [5, 20]
    assert load.summary(recent=True).evenness != load.summary().evenness
    with pytest.raises(InputError, match="no window"):
        counted(1, 2).summary(recent=True)


def test_history_is_bounded_and_exact() -> None:
    layer = LayerCounts(2)
    for second in range(5000):
        layer.add(np.array([1, second % 2]), 1, 0, float(second))
    assert len(layer.moments) < MOST_MOMENTS
    steps = np.diff([moment.seconds for moment in layer.moments])
    assert steps.max() <= 3 * np.median(steps)
    stretches = layer.until(5000.0).intervals()
    assert 10 < len(stretches) <= 40
    assert sum(int(counts[0]) for _, counts in stretches) <= 5000
    for moment in layer.moments:
        assert moment.counts[0] == moment.seconds + 1 == moment.calls


# ---------------------------------------------------------------- counting


def test_watched_layers_count_what_the_reference_counts(built: Callable[..., moegen.Artifact], rng: np.random.Generator) -> None:
    config = built(**SMALL).config
    layer = moegen.load(built(**SMALL).path, threads=2).bind(random_weights(config, rng))
    load = ExpertLoad()
    watched = load.watch(layer, 3)
    assert isinstance(watched, moegen.Layer)
    assert watched.packed is layer.packed
    x = rng.standard_normal((2, 9, config.hidden), dtype=np.float32)
    y, routing = watched(x, return_routing=True)
    assert np.array_equal(watched(x), y)
    out = np.empty_like(x)
    watched.forward_into(x, out)
    assert np.array_equal(out, y)
    assert np.array_equal(watched.experts(x, routing.ids, routing.weights), y)
    layer(x), watched.route(x), watched.profile(x)  # none of which counts
    expected = 4 * np.bincount(routing.ids.ravel(), minlength=config.experts)
    assert load.counts(3).tolist() == expected.tolist()
    summary = load.summary("3")
    assert (summary.calls, summary.tokens, summary.choices, summary.dropped) == (4, 72, 144, 0)


def test_capacity_follows_from_the_choices() -> None:
    load = ExpertLoad()
    load.update(np.array([[0, 1], [0, 2], [0, 1]]), experts=4, capacity=1)
    assert load.summary().dropped == 3
    config = moegen.MoEConfig(**SMALL, capacity_factor=0.5)
    given = ExpertLoad()
    ids = np.array([[0, 1]] * 8)
    given.update(ids, experts=4, capacity=config.capacity(8))
    assert given.summary().dropped == int((~reference.capacity_mask(config, ids)).sum()) > 0


def test_torch_and_dlpack_choices_count() -> None:
    torch = pytest.importorskip("torch")
    from moegen.monitoring.on_device import DeviceCounts

    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    load = ExpertLoad()
    load.update(ids, experts=4)
    load.update(ids.long())
    assert load.counts().tolist() == [2, 2, 0, 4]
    device = DeviceCounts(ids, 4)  # the arithmetic of a device, in torch's CPU tensors
    device.add(torch.tensor([[0, 3], [3, 9], [-1, 3]]), capacity=2)
    new = device.increase()
    assert (new.counts.tolist(), new.tokens, new.dropped, new.invalid, new.calls) == ([1, 0, 0, 3], 3, 1, 2, 1)
    device.add(ids, None)
    assert device.increase().counts.tolist() == [1, 1, 0, 2]


def test_threads_lose_nothing() -> None:
    load, ids = ExpertLoad(window_tokens=100), np.array([[0, 1], [1, 2]])

    def work() -> None:
        for _ in range(300):
            load.update(ids, experts=3)
            load.update(ids, layer="1", experts=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load.to_dict(), load.layers
    for name in ("0", "1"):
        assert load.counts(name).tolist() == [1200, 2400, 1200]
        assert load.summary(name).calls == 1200


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.array([[0, 4]]), "4, which is not between 0 and 3"),
        (np.array([[0, -1]]), "-1, which is not between"),
        (np.array([0, 1]), "integers"),
        (np.array([[0.5]]), "integers"),
        ([[1]], "must be a NumPy array"),
    ],
)
def test_bad_choices_are_refused_and_change_nothing(ids: Any, words: str) -> None:
    load = counted(1, 2, 3, 4)
    with pytest.raises(InputError, match=words):
        load.update(ids)
    assert load.counts().tolist() == [1, 2, 3, 4]
    assert load.summary().calls == 1


def test_layers_are_not_mixed_up() -> None:
    load = counted(1, 1, layer="9")
    load.update(np.zeros((1, 1), int), layer="10", experts=3)
    assert load.layers == ("9", "10")
    with pytest.raises(InputError, match="label of its own"):
        load.update(np.zeros((1, 1), int), layer="9", experts=3)
    with pytest.raises(InputError, match="experts is missing"):
        load.update(np.zeros((1, 1), int), layer="11")
    with pytest.raises(InputError, match="there are: 9, 10"):
        load.summary("8")
    with pytest.raises(InputError, match="not object"):
        load.watch(object())  # type: ignore[type-var]


# ---------------------------------------------------------------- files


def test_counts_of_several_processes_add_up(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, numpy as np; from moegen.monitoring import ExpertLoad; load = ExpertLoad(50.0)\n"
        "for i in range(3): load.update(np.full((4, 1), int(sys.argv[2])), layer='3', experts=2)\nload.save(sys.argv[1])"
    )
    for name, expert in (("a", 0), ("b", 1)):
        assert run_python(code, tmp_path / name, expert).returncode == 0
    both = ExpertLoad.read(tmp_path / "a", tmp_path / "b")
    assert both.counts("3").tolist() == [12, 12]
    assert both.summary("3").calls == 6
    each = 4 * (1 + math.exp(-4 / 50) + math.exp(-8 / 50))
    assert both.counts("3", recent=True) == pytest.approx([each, each])
    assert both.snapshot("3").moments[-1].counts.tolist() == [12, 12]
    again = ExpertLoad.from_dict(json.loads(json.dumps(both.to_dict())))
    assert again.to_dict() == both.to_dict()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a", "b")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "x"}, "holds no counts"),
        ({"schema_version": 9}, "schema 9"),
        ({"layers": {"0": {}}}, "damaged: no field"),
        ({"layers": {"0": {"experts": 3, "counts": [1, 2]}}}, "a count for each of 3"),
        ({"layers": {"0": {"experts": 1, "counts": [-1]}}}, "at least 0"),
        ({"window_tokens": -1}, "positive"),
    ],
)
def test_damaged_files_are_refused(change: dict[str, Any], words: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "load.json"
    file.write_text(json.dumps(counted(1, 2).to_dict() | change))
    with pytest.raises(InputError, match=words):
        ExpertLoad.read(file)
    file.write_text(json.dumps(counted(1, 2).to_dict())[:-9])
    with pytest.raises(InputError, match="not JSON"):
        ExpertLoad.read(file)


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        counted(1, 2).save(tmp_path / "missing" / "load.json")


def test_what_does_not_fit_is_not_merged() -> None:
    with pytest.raises(InputError, match="2 experts in one and 3"):
        ExpertLoad.merged([counted(1, 2), counted(1, 2, 3)])
    with pytest.raises(InputError, match="windows"):
        ExpertLoad.merged([counted(1, 2), counted(1, 2, window_tokens=5.0)])


# ---------------------------------------------------------------- out


def test_prometheus_text_is_what_its_own_parser_reads() -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    label = 'a "quoted" \\ label\nin two lines'
    load = counted(3, 0, 9, layer=label, window_tokens=100.0)
    load.update(np.zeros((0, 1), int), layer="empty", experts=2)
    text = load.prometheus()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.labels["layer"], s.labels["expert"]): s.value for s in families["moegen_expert_choices"].samples}
    assert samples == {(label, "0"): 3, (label, "1"): 0, (label, "2"): 9, ("empty", "0"): 0, ("empty", "1"): 0}
    assert families["moegen_expert_choices"].type == "counter"
    assert "# TYPE moegen_expert_choices_total counter" in text
    evenness = {(s.labels["layer"], s.labels["over"]): s.value for s in families["moegen_expert_load_evenness_ratio"].samples}
    assert evenness == {(label, over): pytest.approx(load.summary(label).evenness) for over in ("total", "window")}
    assert all(family.documentation for family in families.values())


def test_prometheus_missing_is_one_sentence() -> None:
    done = run_python(
        "import sys; sys.modules['prometheus_client'] = None\nfrom moegen.monitoring import ExpertLoad\nExpertLoad().prometheus()"
    )
    assert "pip install 'moegen[monitoring]'" in done.stderr


def test_pictures_and_pages(tmp_path: pathlib.Path, rng: np.random.Generator) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from moegen import report

    several = ExpertLoad()
    for name in range(12):
        several.update(rng.integers(0, 16, (40, 2)), layer=name, experts=16)
    several.update(rng.integers(0, 3, (4, 1)), layer="narrow", experts=3)
    for name, load in {"several": several, "one": counted(4), "none": ExpertLoad()}.items():
        with Image.open(report.expert_load(load, tmp_path / f"{name}.png")) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 5
        load.save(tmp_path / f"{name}.json")
    bars, *_ = report.experts.figure(counted(4)).axes
    covered = [text.get_window_extent() for text in bars.texts]
    assert not any(box.overlaps(bar.get_window_extent()) for box in covered for bar in bars.patches)
    page = report.write([tmp_path / "several.json", tmp_path / "several.json"], tmp_path / "page").read_text(encoding="utf-8")
    assert "Which experts work" in page
    assert "<td>160</td>" in page  # choices of both files, twice 40 * 2
    bad = tmp_path / "bad.json"
    counted(1, 2, layer="narrow").save(bad)
    with pytest.raises(ReportError, match="'narrow' has 3 experts in one and 2"):
        report.write([tmp_path / "several.json", bad], tmp_path / "page")
