"""The layering rule: the package is one straight line, and running a layer needs neither compiler nor templates."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest
from helpers import ROOT

PACKAGE = ROOT / "moegen"

# A module imports only from those above it. Modules on one line do not import one another.
ORDER = (
    ("errors", "interrupts"),
    ("version",),
    ("paths",),
    ("own_processes",),
    ("sources",),
    ("storage", "hf_source"),
    ("hf_quantization",),
    ("hf",),
    ("config",),
    ("target", "te_module"),
    ("machine",),
    ("toolchain",),
    ("geometry",),
    ("cuda_geometry",),
    ("arrays",),
    ("safetensors",),
    ("quantization",),
    ("formats",),
    ("checkpoints",),
    ("naming",),
    ("orientation",),
    ("weights",),
    ("reference",),
    ("packing",),
    ("artifact",),
    ("moepack_format",),
    ("moepack",),
    ("calls", "first_use", "routing"),
    ("device_arrays",),
    ("device",),
    ("runtime",),
    ("torch",),
    ("verification",),
    ("monitoring",),
    ("emission",),
    ("schedules",),
    ("intrinsics", "rewriting"),
    ("compiler",),
    ("choices",),
    ("records",),
    ("cuda",),
    ("plan",),
    ("objects",),
    ("builder",),
    ("batch",),
    ("display",),
    ("transformers",),
    ("presets",),
    ("options",),
    ("pack",),
    ("bench",),
    ("distributed",),
    ("field",),
    ("tune",),
    ("report",),
    ("serve_bench",),
    ("validation",),
    ("cli",),
    ("__main__",),
)
# The same inside a sub-package.
INSIDE = {
    "validation": (
        ("layers", "intervals", "limits", "environment", "claims"),
        ("scope", "others"),
        ("proofs", "fresh", "speed", "pictures", "printing"),
        ("page",),
        ("run",),
        ("__init__",),
        ("command",),
    ),
    "monitoring": (
        ("measures", "on_device", "watching"),
        ("counts", "prometheus"),
        ("load",),
        ("__init__",),
    ),
    "bench": (
        ("ceilings",),
        ("workload",),
        ("contenders",),
        ("request",),
        ("measure",),
        ("preparing", "results"),
        ("printing",),
        ("run",),
        ("__init__",),
        ("command",),
    ),
    "bench.contenders": (
        ("roster", "family"),
        ("moegen_layer", "numpy_layer", "onnx_layer", "torch_layer"),
        ("onednn_layer",),
        ("worker",),
        ("process",),
        ("team",),
        ("__init__",),
    ),
    "pack": (
        ("finding", "writing"),
        ("packing",),
        ("__init__",),
        ("command",),
    ),
    "tune": (
        ("search", "processes", "times", "journal", "space", "measurers"),
        ("processors", "devices"),
        ("kinds",),
        ("places",),
        ("wire",),
        ("host",),
        ("guest",),
        ("processor_guest", "device_guest"),
        ("errand",),
        ("remote",),
        ("worker", "building"),
        ("device_worker",),
        ("lines",),
        ("stand",),
        ("session",),
        ("verdicts",),
        ("shelf",),
        ("__init__",),
        ("command",),
    ),
    "cuda": (
        ("architectures", "device_count", "hardware", "kernels", "ptx", "wheels", "nvrtc_program"),
        ("cubins",),
        ("nvidia",),
        ("sass", "embedding", "translation"),
        ("native",),
        ("emulated_driver", "emulator", "guarded"),
        ("emission",),
        ("choices",),
        ("hopper", "planning", "rewriting"),
        ("joining",),
        ("compiler",),
        ("library",),
        ("making",),
        ("listing", "proof", "emulated_proof"),
        ("__init__",),
    ),
    "distributed": (
        ("placement", "meeting", "building"),
        ("exchange", "link", "share"),
        ("parallel",),
        ("__init__",),
    ),
    "field": (
        ("targets", "budget", "jobs", "stock"),
        ("cells", "surroundings", "building", "checks"),
        ("prove", "watching"),
        ("material", "capture"),
        ("torch_experts", "ceilings", "fused_kernels"),
        ("truth", "own_experts", "hf_experts", "fused_experts"),
        ("measure",),
        ("worker",),
        ("summary",),
        ("drawing",),
        ("run",),
        ("__init__",),
        ("__main__",),
    ),
    "serve_bench": (
        ("sizes", "outcomes"),
        ("arrivals", "summary"),
        ("batching",),
        ("request",),
        ("openai_api", "worker"),
        ("client", "layers"),
        ("results",),
        ("printing",),
        ("drawing", "run"),
        ("__init__",),
        ("command",),
    ),
    "torch": (
        ("handles",),
        ("opening",),
        ("ops",),
        ("bound",),
        ("layer",),
        ("gradients",),
        ("trained",),
        ("trainable",),
        ("__init__",),
    ),
    "transformers": (
        ("building", "gating", "released"),
        ("experts",),
        ("packed",),
        ("operators",),
        ("implementation",),
        ("serve", "speed"),
        ("__init__",),
    ),
    "report": (
        ("readings",),
        ("drawing", "tables"),
        ("comparisons", "experts", "insides"),
        ("pictures",),
        ("page",),
        ("__init__",),
        ("command",),
    ),
}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
INIT = ("own_processes", "paths", "version")  # what `import moegen` itself loads; the other names come when first used

RUNTIME_NEVER = {
    "cuda",
    "emission",
    "compiler",
    "hopper",
    "intrinsics",
    "rewriting",
    "plan",
    "builder",
    "batch",
    "schedules",
    "choices",
    "records",
    "objects",
}
RUNTIME_NEVER |= {"verification", "reference", "bench", "pack", "report", "serve_bench", "tune", "cli", "monitoring", "validation"}
FOREIGN_NEVER = {"tvm", "jinja2", "xgboost", "click", "torch", "tqdm", "ml_dtypes", "matplotlib", "PIL"}
FOREIGN_ONLY_IN = {
    "tvm": {"compiler", "cuda.compiler", "cuda.hopper", "cuda.rewriting", "intrinsics", "rewriting", "tune.host", "tune.wire"},
    "jinja2": {"emission", "report.page"},
    "matplotlib": {"field.drawing", "report.drawing"},
    "PIL": {"report.drawing"},
    "click": {
        "bench.command",
        "cli",
        "options",
        "pack.command",
        "report.command",
        "serve_bench.command",
        "tune.command",
        "tune.shelf",
        "validation.command",
    },
    "tqdm": {"bench.command", "cli", "pack.command", "serve_bench.command", "tune.command"},
    "torch": {"bench.contenders.onednn_layer", "bench.contenders.torch_layer"}
    | {f"field.{name}" for name in ("capture", "ceilings", "fused_experts", "hf_experts", "material", "measure")}
    | {f"field.{name}" for name in ("torch_experts", "truth", "worker")}
    | {f"torch.{name}" for name in ("__init__", "bound", "gradients", "layer", "opening", "ops", "trainable", "trained")}
    | {
        f"transformers.{name}"
        for name in ("__init__", "experts", "gating", "implementation", "operators", "packed", "released", "speed")
    }
    | {f"distributed.{name}" for name in ("exchange", "link", "parallel")},
    "triton": {"field.fused_experts", "field.fused_kernels"},
    "transformers": {"field.hf_experts"}
    | {f"transformers.{name}" for name in ("__init__", "implementation", "operators", "serve", "speed")},
    "aiohttp": {"serve_bench.openai_api"},
    "yarl": {"serve_bench.openai_api"},
    "onnx": {"bench.contenders.onnx_layer"},
    "onnxruntime": {"bench.contenders.onnx_layer"},
    "ml_dtypes": set(),
    "xgboost": {"tune.search"},
    "prometheus_client": {"monitoring.prometheus"},
}
SCHEDULES_MAY = {"config", "cuda_geometry", "errors", "geometry", "target", "schedules"}


def _sources() -> dict[str, pathlib.Path]:
    """Dotted name inside the package -> file; the schedules are part of the package."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    found |= {
        ".".join(["schedules", *path.relative_to(ROOT / "schedules").with_suffix("").parts]): path
        for path in (ROOT / "schedules").rglob("*.py")
    }
    return found


SOURCES = _sources()


@functools.cache
def _imports(name: str, deferred: bool = True) -> frozenset[tuple[str, ...]]:
    """Absolute dotted names that module `name` imports; imports for type checkers only do not count.

    Args:
        deferred: count imports inside functions too.
    """
    path = SOURCES[name]
    package = ["moegen", *name.split(".")]
    if path.name == "__init__.py" and name != "__init__":
        package = package[:-1]
    else:
        package = package[:-1] if name != "__init__" else ["moegen"]
    found: set[tuple[str, ...]] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred:
            return
        if isinstance(node, ast.Import):
            found.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                found.add((*base, alias.name) if base[0] == "moegen" else tuple(base))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found)


def _inside(name: str, deferred: bool = True) -> set[str]:
    """Modules of the package that `name` imports, by their first dotted part; `moegen.Name` means `__init__`."""
    parts = {target[1] if len(target) > 1 else "__init__" for target in _imports(name, deferred) if target[0] == "moegen"}
    return {part if part in LEVEL or part == "__init__" else "__init__" for part in parts} - {name.split(".")[0]}


def _within(name: str, package: str) -> set[str]:
    """Modules directly inside a sub-package that its module `name` imports, itself left out."""
    path = tuple(package.split("."))
    known = {part for names in INSIDE[package] for part in names}
    beyond = [target[1:] for target in _imports(name) if target[0] == "moegen" and target[1 : 1 + len(path)] == path]
    parts = {target[len(path)] if len(target) > len(path) else "__init__" for target in beyond}
    return {part if part in known else "__init__" for part in parts} - {_place(name, package)}


def _place(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.").split(".")[0]


def _outside(name: str) -> set[str]:
    return {target[0] for target in _imports(name)} - {"moegen"}


def _reachable(name: str) -> set[str]:
    """The modules of the package that importing or using `name` loads; imports inside functions count."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        files = [current] if current in SOURCES else [n for n in SOURCES if n.startswith(f"{current}.")]
        for file in files:
            todo += _inside(file) - {"__init__"}
    return seen


def test_every_module_has_a_place() -> None:
    assert {name.split(".")[0] for name in SOURCES} - {"__init__"} <= set(LEVEL)
    expected = {"runtime", "builder", "compiler", "config", "schedules.llvm.tiling"}
    assert expected <= set(SOURCES), "the test looks in the wrong place"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_only_from_above(name: str) -> None:
    if name == "__init__":
        assert _inside(name, deferred=False) - {"__init__"} <= set(INIT)
        return
    level = LEVEL[name.split(".")[0]]
    below = {other for other in _inside(name) if other != "__init__" and LEVEL[other] >= level}
    assert not below, f"moegen.{name} imports {sorted(below)}, which come after it"
    if name not in ("cli", "__main__"):
        assert "__init__" not in _inside(name), f"moegen.{name} imports the package that imports it"


@pytest.mark.parametrize("package", INSIDE)
def test_sub_packages_are_straight_lines(package: str) -> None:
    level = {name: at for at, names in enumerate(INSIDE[package]) for name in names}
    members = [name for name in SOURCES if name.startswith(f"{package}.")]
    assert {_place(name, package) for name in members} == set(level)
    for name in members:
        below = {other for other in _within(name, package) if level[other] >= level[_place(name, package)]}
        assert not below, f"moegen.{name} imports {sorted(below)}, which come after it"


def test_every_sub_package_has_an_order() -> None:
    packages = {name.removesuffix(".__init__") for name in SOURCES if name.endswith(".__init__")}
    assert {name for name in packages if not name.startswith("schedules")} == set(INSIDE)


def test_no_cycles() -> None:
    """Also among the modules of schedules/, and whatever ORDER says."""
    graph = {
        name: {".".join(t[1:n]) for t in _imports(name) if t[0] == "moegen" for n in range(2, len(t) + 1)} & set(SOURCES) - {name}
        for name in SOURCES
    }
    for package in [name for name in SOURCES if name.endswith(".__init__")]:
        parent = package.removesuffix(".__init__")
        for name, targets in graph.items():
            wants = {".".join(t[1:]) for t in _imports(name) if t[0] == "moegen"}
            if (
                name != package
                and any(want == parent or want.startswith(f"{parent}.") for want in wants)
                and not name.startswith(parent)
            ):
                targets.add(package)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_runtime_needs_no_compiler() -> None:
    reachable = _reachable("runtime")
    assert {"artifact", "weights", "arrays", "config"} <= reachable
    assert not reachable & RUNTIME_NEVER
    for name in reachable & set(SOURCES):
        assert not _outside(name) & FOREIGN_NEVER, f"moegen.{name} imports {_outside(name) & FOREIGN_NEVER}"
        foreign = _outside(name) - {"numpy", "tvm_ffi", "__future__"}
        assert foreign <= set(_standard_library()), f"moegen.{name} needs {foreign - set(_standard_library())}"


def _standard_library() -> frozenset[str]:
    import sys

    return frozenset(sys.stdlib_module_names)


def test_verifying_needs_no_compiler() -> None:
    assert not _reachable("verification") & {"emission", "compiler", "builder", "schedules"}


@pytest.mark.parametrize("foreign", FOREIGN_ONLY_IN)
def test_foreign_packages_stay_in_their_place(foreign: str) -> None:
    """TVM is met in the compiler and its two tools only: schedules are handed the schedule they transform."""
    users = {name for name in SOURCES if foreign in _outside(name)}
    assert users <= FOREIGN_ONLY_IN[foreign]


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.startswith("schedules.")))
def test_schedules_know_sizes_and_targets_only(name: str) -> None:
    assert {part for part in _inside(name) if part != "__init__"} <= SCHEDULES_MAY
    assert "__init__" not in _inside(name)
    assert _outside(name) <= set(_standard_library())


def test_the_test_sees_what_is_forbidden(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that cannot fail is none."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "from . import emission\ndef f():\n    import tvm.te\n    from .builder import plan\n    from moegen.cli import main\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(SOURCES, "bad", bad)
    monkeypatch.setitem(LEVEL, "bad", LEVEL["runtime"])
    _imports.cache_clear()
    worse = tmp_path / "worse.py"
    worse.write_text("from . import Subject\nfrom .. import bench\ndef f():\n    from .run import bench\n", encoding="utf-8")
    monkeypatch.setitem(SOURCES, "bench.worse", worse)
    assert _within("bench.worse", "bench") == {"__init__", "run"}
    assert _inside("bad") == {"emission", "builder", "cli"}
    assert _inside("bad", deferred=False) == {"emission"}
    assert _outside("bad") == {"typing", "tvm"}
    assert {"emission", "builder", "compiler", "schedules"} <= _reachable("bad")
    _imports.cache_clear()
