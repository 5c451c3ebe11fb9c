"""The emitted text: golden files, valid Python for every variant, nothing left to substitute, the same each time."""

from __future__ import annotations

import ast
import pathlib
import re
from typing import Any

import jinja2
import pytest
from test_numerics import GATINGS

import moegen
from moegen import emission
from moegen.config import ACTIVATIONS, DTYPES
from moegen.geometry import Geometry, Regime, Tiling
from moegen.objects import HOST_FILES
from moegen.target import Target

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
LONGEST_LINE = 160

# Not this machine's: the text must not depend on where the tests run.
TARGET = Target("llvm", "x86-64-v3", "x86_64", ("avx2", "fma"), (), 8, 16)
TILING = Tiling(lanes=8, max_rows=6, chunk_rows=108, k_block=1024)

REGIMES = (Regime(12, 4, 12), Regime(None, 6, 108))

GOLDENS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": 8, "top_k": 2, "hidden": 64, "intermediate": 96},
    "deepseek_v3": {
        "experts": 16,
        "top_k": 4,
        "hidden": 2880,
        "intermediate": 72,
        "dtype": "bfloat16",
        "gating": "sigmoid",
        "correction_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling": 2.5,
        "shared_intermediate": 48,
    },
    "gpt_oss": {
        "experts": 5,
        "top_k": 2,
        "hidden": 200,
        "intermediate": 33,
        "dtype": "float16",
        "gating": "topk_softmax",
        "activation": "swiglu_clamped",
        "router_bias": True,
        "expert_bias": True,
    },
    "llama4": {
        "experts": 4,
        "top_k": 1,
        "hidden": 1,
        "intermediate": 3,
        "gating": "sigmoid",
        "activation": "relu2",
        "renormalize": False,
        "weight_on_input": True,
        "shared_intermediate": 5,
        "shared_gate": True,
        "capacity_factor": 1.25,
    },
}


def _geometry(tiling: Tiling = TILING, **fields: Any) -> Geometry:
    return Geometry(moegen.MoEConfig(**fields), tiling)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a few layers, to be read in review; `pytest --update-golden` writes it anew."""
    monkeypatch.setattr(emission, "__version__", "X.Y.Z")
    text = emission.te_source(_geometry(**GOLDENS[name]), TARGET)
    path = GOLDEN / f"{name}.py.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), "pytest --update-golden writes the golden files"
    assert text == path.read_text(encoding="utf-8"), "the emitted text changed; pytest --update-golden accepts that"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.py.txt" for name in GOLDENS}


def _check_text(text: str, config: moegen.MoEConfig) -> ast.Module:
    tree = ast.parse(text)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#|#\}", text), "unresolved template"
    assert "Undefined" not in text
    assert "\t" not in text
    assert text.endswith("\n")
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= LONGEST_LINE, f"line {number} has {len(line)} characters: {line[:80]}..."
        assert line == line.rstrip(), f"white space at the end of line {number}"
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {
        "stages",
        "gather",
        "router",
        "topk",
        "dispatch",
        "finish",
        "losses",
        "expert_up",
        "expert_down",
    } <= functions
    assert ("shared_up" in functions) == bool(config.shared_intermediate)
    assert ("gather_weighted" in functions) == config.weight_on_input
    return tree


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """(names read anywhere, names bound at the top level)."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            bound |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    return read, bound


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"expert_bias": True, "shared_intermediate": 24},
    {"shared_intermediate": 24, "shared_gate": True, "capacity_factor": 1.1},
    {"top_k": 2, "router_bias": True},
    {"weight_on_input": True, "expert_bias": True},
)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_variant_is_valid_python(gating: str, activation: str) -> None:
    """Every activation with every gating; dtypes and the other fields take turns."""
    turn = list(ACTIVATIONS).index(activation) + list(GATINGS).index(gating)
    fields = {"experts": 8, "top_k": 1, "hidden": 40, "intermediate": 24, "activation": activation, **GATINGS[gating]}
    geometry = _geometry(**fields | {"dtype": DTYPES[turn % 3]} | EXTRAS[turn % 5])
    tree = _check_text(emission.te_source(geometry, TARGET), geometry.config)
    read, bound = _names(tree)
    assert bound - read <= {"stages", "CONFIG", "TILING", "i64", "f64", "ir", "IRBuilder"}, "emitted, but used by nobody"


def test_constants_are_in_the_text() -> None:
    """Sizes, top-k and activation constants are literals; only T (and the numbers of blocks and rows) are symbolic."""
    fields = {
        "experts": 24,
        "top_k": 3,
        "hidden": 72,
        "intermediate": 40,
        "activation": "swiglu_clamped",
        "swiglu_alpha": 1.625,
        "swiglu_limit": 6.125,
        "gating": "sigmoid",
        "routed_scaling": 2.875,
    }
    geometry = _geometry(**fields)
    text = emission.te_source(geometry, TARGET)
    for constant in ("1.625", "6.125", "2.875"):
        assert constant in text.split("TILING", 1)[1], constant
    variables = set(re.findall(r'te\.var\("(\w+)"', text))
    assert variables == {"T", "B", "M", "P", "R", "capacity", "first", "jump"}, variables
    values: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("CONFIG", "TILING"):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    assert moegen.MoEConfig.from_dict(values["CONFIG"]) == geometry.config
    assert Tiling(**values["TILING"]) == TILING
    assert moegen.__version__ in text.splitlines()[2]
    for stage in ("0", "1", "2"):
        assert f"best{stage}" in text
    assert "best3" not in text


@pytest.mark.parametrize("fields", GOLDENS.values(), ids=GOLDENS)
def test_the_same_text_every_time(fields: dict[str, Any]) -> None:
    def texts() -> tuple[str, str]:
        geometry = _geometry(**fields)
        return emission.te_source(geometry, TARGET), emission.host_source(geometry, ["gather", "topk"], REGIMES)

    assert texts() == texts()


def test_large_layers_keep_their_text_short() -> None:
    """256 experts or a hidden size of 7168 do not unroll; K=16 does, in lines that can be read."""
    base = len(emission.te_source(_geometry(experts=8, top_k=2, hidden=64, intermediate=96), TARGET))
    large = emission.te_source(_geometry(experts=256, top_k=16, hidden=7168, intermediate=2048), TARGET)
    _check_text(large, moegen.MoEConfig(experts=256, top_k=16, hidden=7168, intermediate=2048))
    assert len(large) < 3 * base


def test_the_most_experts_and_choices() -> None:
    config = {"experts": 4096, "top_k": 64, "hidden": 16, "intermediate": 16}
    _check_text(emission.te_source(_geometry(**config), TARGET), moegen.MoEConfig(**config))


def test_undefined_names_are_errors() -> None:
    """A placeholder that nobody fills is noticed when the text is rendered."""
    environment = emission.environment()
    assert environment.undefined is jinja2.StrictUndefined
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ nobody }}").render()


def test_the_host_is_complete() -> None:
    """The C++ host of every golden layer: no unresolved templates, its includes are shipped, braces match."""
    for fields in GOLDENS.values():
        geometry = _geometry(**fields)
        text = emission.host_source(geometry, ["gather", "topk", "router_1"], REGIMES)
        assert not re.search(r"\{\{|\{%|%\}|\{#|#\}", text.replace("{{}", ""))
        assert text.count("{") == text.count("}")
        for name in re.findall(r'#include "([\w.]+)"', text):
            assert name in HOST_FILES
            assert (emission.package_folder("templates") / "llvm" / name).is_file()
        assert str(geometry.packed_bytes) in text


def test_the_segments_of_the_host_are_those_of_the_manifest() -> None:
    for fields in GOLDENS.values():
        geometry = _geometry(**fields)
        text = emission.host_source(geometry, ["gather"], REGIMES)
        table = text.split("kSegments[] = {", 1)[1].split("};", 1)[0]
        rows = re.findall(r"\{(\d+), (\d+),.*\},\s*// (\w+)", table)
        expected = [(s.offset_bytes, 32 if s.dtype == "float32" else 16, s.name) for s in geometry.segments]
        assert [(int(offset), int(width), name) for offset, width, name in rows] == expected
