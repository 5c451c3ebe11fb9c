"""The report: what is drawn and said for results that are good, wrong, few, many or malformed. All figures here are made up."""

from __future__ import annotations

import copy
import io
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import ROOT

from moegen import cli
from moegen.errors import ReportError

pytest.importorskip("matplotlib", reason="the [report] extra is not installed")

from moegen import display, report
from moegen.report import drawing, pictures, readings, tables

PARTS = ("router", "topk", "dispatch", "gather", "up", "down", "finish")


def _contender(name: str, seconds: float, tokens: int, status: str = "correct") -> dict[str, Any]:
    blank = status == "failed"
    return {
        "name": name,
        "seconds": None if blank else dict.fromkeys(("median", "p95", "p99", "min", "max"), seconds),
        "samples": [] if blank else [seconds],
        "calls": 0 if blank else 7,
        "tokens_per_s": None if blank else tokens / seconds,
        "flops_per_s": None if blank else 1e6 * tokens / seconds,
        "bytes_per_s": None if blank else 1e6 / seconds,
        "roofline_fraction": None if blank else 1e-3 / seconds,
        "ratio_to_moegen": None if blank else seconds / 2e-3,
        "relative_l2": None if blank else 0.25 if status == "wrong" else 1e-7,
        "status": status,
        "reason": None if status == "correct" else f"<{status}> & so on",
    }


def _point(tokens: int, contenders: list[dict[str, Any]], experts: int = 4) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "flops": 1e6 * tokens,
        "active_experts": float(min(experts, 2 * tokens)),
        "weight_bytes_read": 1e6,
        "ceilings": {
            "flops_per_s": 4e11,
            "read_bytes_per_s": 4e10,
            "flops_samples": [4e11, 3.9e11],
            "read_samples": [4e10],
            "kind": "fma",
        },
        "roofline_seconds": 1e-3,
        "contenders": contenders,
        "parts": dict.fromkeys(PARTS, 2e-4),
        "expert_load": [2 * tokens, *[0] * (experts - 1)],
        "workspace_bytes": 4096,
        "dense": {"seconds": 4e-3, "measured_ratio": 2.0, "arithmetic_ratio": 2.0, "how": "one wide FFN"},
    }


def _run(*points: dict[str, Any], name: str = "made up", routing: str = "uniform", **fields: Any) -> dict[str, Any]:
    return {
        "preset": "toy",
        "name": name,
        "config": {"experts": 4, "top_k": 2, "hidden": 8, "intermediate": 16, "dtype": "float32"},
        "scaled": {"changes": {"hidden": [4096, 8]}, "why": "it is a toy"},
        "threads": 2,
        "routing": routing,
        "seed": 0,
        "artifact": "moe-e4-k2-h8",
        "weights_bytes": 1000,
        "packed_bytes": 1024,
        "library_bytes": 2048,
        "seconds": {"build": None, "load": 1e-3, "bind": 1e-3, "first_call": 2e-3},
        "absent": [{"name": "rival_c", "reason": "package rival is not installed"}],
        "points": list(points),
    } | fields


def _results(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "moegen-bench",
        "created": "2000-01-01T00:00:00+00:00",
        "versions": {"moegen": "0.0.0", "python": "3.x"},
        "machine": {"cpu": "Imaginary CPU", "processors": 2, "l3_bytes": None, "memory_bytes": 1 << 30},
        "runs": list(runs),
    }


def _both(tokens: int) -> dict[str, Any]:
    return _point(tokens, [_contender("moegen", 2e-3, tokens), _contender("rival_a", 3e-3, tokens)])


@pytest.fixture
def results() -> dict[str, Any]:
    return _results(_run(_both(1), _both(16)), _run(_both(1), name="made up zipf", routing="zipf"))


def _save(folder: pathlib.Path, value: Any, name: str = "results.json") -> pathlib.Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def _text(page: pathlib.Path) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))


def _trial(trial: int, seconds: float | None, status: str = "correct") -> str:
    return json.dumps({"trial": trial, "seconds": seconds, "status": status, "default_seconds": 4e-3})


def test_page_and_pictures(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    decided = [json.dumps({"kind": "decision", "reason": reason}) for reason in ("its gain is within noise", "a fifth less time")]
    lines = [_trial(0, 5e-3), _trial(1, None, "rejected"), _trial(2, 2e-3), *decided]
    records = _save(tmp_path, "\n".join(lines) + "\n", "up.jsonl")
    page = report.write([_save(tmp_path, results), records], tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "index.html"
    names = [f"{what}-float32-2t.png" for what in ("throughput", "ratio", "roofline", "parts")]
    assert sorted(path.name for path in page.parent.glob("*.png")) == sorted([*names, "load.png", "tuning.png"])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 6
    assert not re.search(r'(?:src|href)="(?:https?:|//)', text), "the page is one file"
    for said in (
        "Imaginary CPU",
        "1.1 GB of memory",
        "moegen 0.0.0",
        "hidden 4096 -&gt; 8",
        "it is a toy",
        "package rival is not installed",
    ):
        assert said in text
    for said in ("rival_a", "tokens/s", "made up zipf", "agreed with the float64 reference", "one wide FFN", "a fifth less time"):
        assert said in text
    assert "no tuning records" not in text
    assert "within noise" not in text, "the last decision counts"


def test_without_tuning_records_the_page_says_so(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    page = report.write([_save(tmp_path, results)], tmp_path / "out")
    assert "no tuning records were given" in _text(page)
    assert not (tmp_path / "out" / "tuning.png").exists()


def test_only_tuning_records(tmp_path: pathlib.Path) -> None:
    page = report.write([_save(tmp_path, _trial(0, None, "timeout"), "one.jsonl")], tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["tuning.png"]
    assert "no measured runs" in _text(page)


def test_wrong_and_failed_have_no_speed(tmp_path: pathlib.Path) -> None:
    bad = [_contender("rival_a", 0.000123456, 16, "wrong"), _contender("rival_b", 1, 16, "failed")]
    run = _run(_point(16, [_contender("moegen", 2e-3, 16), *bad]))
    text = _text(report.write([_save(tmp_path, _results(run))], tmp_path))
    assert "0.123" not in text
    assert f"{16 / 0.000123456:,.0f}" not in text
    assert "&lt;wrong&gt; &amp; so on" in text
    assert text.count("&lt;failed&gt; &amp; so on") == 2
    assert "2.5e-01" in text
    (row,) = tables.overview(readings.read([tmp_path / "results.json"])).rows
    assert row.cells[1] == display.NOTHING, "a wrong contender is not the fastest"


def test_wrong_contenders_are_not_drawn(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(drawing, "png", lambda figure: figures.append(figure) or b"")
    wrong = _point(1, [_contender("moegen", 2e-3, 1), _contender("rival_a", 1e-3, 1, "wrong")])
    ours_wrong = _point(64, [_contender("moegen", 2e-3, 64, "wrong"), _contender("rival_a", 1e-3, 64)])
    path = _save(tmp_path, _results(_run(wrong, _both(16), ours_wrong)))
    list(pictures.draw(readings.read([path])))
    throughput, ratio = (figure.axes[0] for figure in figures[:2])
    ours, rival = (list(line.get_ydata()) for line in throughput.lines)
    assert [y == y for y in ours] == [True, True, False]
    assert [y == y for y in rival] == [False, True, True]
    assert [y == y for y in ratio.lines[0].get_ydata()] == [False, True, False], "no ratio to a wrong result either"
    notes = [text.get_text() for text in throughput.texts]
    assert notes == ["No speed shown: moegen wrong at T=64; rival_a wrong at T=1"]


def test_contenders_keep_their_colours() -> None:
    names = ["moegen", *(f"rival_{i:02}" for i in range(30))]
    made = drawing.styles(reversed(names))
    assert made == drawing.styles(names)
    assert len({(style.colour, style.marker, style.dash) for style in made.values()}) == len(names)
    assert [name for name, style in made.items() if style.colour == drawing.OURS_COLOUR] == ["moegen"]


def test_the_same_files_give_the_same_bytes(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    path = _save(tmp_path, results)
    first, second = (report.write([path], tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a" / "load.png").read_bytes() == (tmp_path / "b" / "load.png").read_bytes()


def test_pictures_are_light_and_hold_everything(tmp_path: pathlib.Path) -> None:
    """Many contenders with long names and decades between them; one point; one expert; a crowd of experts."""
    names = ["moegen", *(f"a_rival_with_a_name_too_long_for_any_legend_number_{i}" for i in range(12))]
    many = [_point(1 << t, [_contender(n, 2e-3 * 4**i, 1 << t) for i, n in enumerate(names)], 256) for t in range(13)]
    one = _point(1, [_contender("moegen", 2e-3, 1)], 1)
    path = _save(tmp_path, _results(_run(*many, name="a name of many words " * 8), _run(one, threads=1, preset=None)))
    page = report.write([path], tmp_path / "out")
    images = list(page.parent.glob("*.png"))
    assert len(images) == 8
    assert [image.name for image in images if image.name.startswith("ratio")] == ["ratio-float32-2t.png"], "one has no contenders"
    assert all(len(image.read_bytes()) < 200_000 for image in images)
    from PIL import Image

    sizes = [Image.open(io.BytesIO(image.read_bytes())).size for image in images]
    assert all(600 < width < 1800 and 300 < height < 2400 for width, height in sizes)


def test_runs_of_one_name_are_told_apart(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    both = [_save(tmp_path, results, name) for name in ("a.json", "b.json")]
    labels = [run.label for run in readings.read(both).runs]
    assert labels == ["made up #1", "made up zipf #1", "made up #2", "made up zipf #2"]


def test_nothing_measured(tmp_path: pathlib.Path) -> None:
    text = _text(report.write([_save(tmp_path, _results(_run()))], tmp_path))
    assert "Nothing was measured." in text
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("schema_version",), 2, "schema_version=2, this moegen reads 1"),
        (("machine",), None, "machine is null, not an object"),
        (("runs",), {}, "runs is {}, not a list"),
        (("runs", 0, "threads"), "two", 'runs[0].threads is "two", not an integer'),
        (("runs", 0, "points", 1, "tokens"), 0, "runs[0].points[1].tokens is 0, not positive"),
        (("runs", 0, "points", 0, "ceilings", "kind"), ..., "runs[0].points[0].ceilings.kind is missing"),
        (("runs", 0, "points", 0, "contenders", 0, "status"), "fine", "'fine', not one of correct, wrong, failed"),
        (("runs", 0, "points", 0, "contenders", 1, "seconds"), None, "contenders[1] is correct but lacks a positive median"),
        (("runs", 0, "points", 0, "expert_load"), [1, True], "expert_load[1] is true, not an integer"),
    ],
)
def test_malformed_results(tmp_path: pathlib.Path, results: dict[str, Any], where: tuple[Any, ...], value: Any, said: str) -> None:
    broken = copy.deepcopy(results)
    inner: Any = broken
    for step in where[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    path = _save(tmp_path, broken)
    with pytest.raises(ReportError) as refused:
        report.write([path], tmp_path / "out")
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("not json", "line 1 is not JSON"),
        ("[1]", "neither results"),
        ('{"kind": "other"}', "neither results"),
        (_trial(0, 1.0) + "\n{}", "line 2.trial is missing"),
        (_trial(0, 1.0) + '\n{"trial": 1, "sec', "line 2 is not JSON"),
        (_trial(0, float("nan")), "line 1 is not JSON"),
        ('{"trial": 0, "seconds": 1, "status": "correct", "default_seconds": 0}', "default_seconds is 0, not positive"),
    ],
)
def test_malformed_files(tmp_path: pathlib.Path, text: str, said: str) -> None:
    with pytest.raises(ReportError, match=re.escape(said)):
        report.write([_save(tmp_path, text, "file")], tmp_path / "out")


def test_files_that_are_not_there(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="at least one file"):
        report.write([], tmp_path)
    with pytest.raises(ReportError, match=r"gone\.json cannot be read \(No such file or directory\)"):
        report.write([tmp_path / "gone.json"], tmp_path)
    path = _save(tmp_path, results)
    with pytest.raises(ReportError, match="cannot be written to"):
        report.write([path], path)


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra(missing: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules[{missing!r}] = None
import moegen.report
from moegen.errors import ReportError
try:
    moegen.report.write([], 'out')
except ReportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert missing in done.stdout
    assert "pip install 'moegen[report]'" in done.stdout


def test_ticks_read_well() -> None:
    assert [drawing.short(value) for value in (999.9, 0.05, 30_000, 2e6)] == ["1k", "0.05", "30k", "2M"]


def test_command(tmp_path: pathlib.Path, results: dict[str, Any]) -> None:
    path = _save(tmp_path, results)
    done = CliRunner().invoke(cli.main, ["report", str(path), "--out", str(tmp_path / "out")])
    assert done.stdout == f"{tmp_path / 'out' / 'index.html'}\n"
    assert (tmp_path / "out" / "index.html").is_file()
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path / "b.json"), "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: there is no file")
