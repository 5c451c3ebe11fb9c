"""The wheel: what is in it, what it needs without and with the compiler, and what importing it costs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from helpers import run_python

import moegen
from moegen.reference import moe, random_weights

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {"experts": 4, "top_k": 2, "hidden": 32, "intermediate": 32}
COMPILER = ("tvm", "jinja2", "xgboost", "tqdm")
NOT_FOR_RUNNING = (*COMPILER, "click", "torch", "ml_dtypes", "transformers", "safetensors", "scipy", "multiprocessing")


def _run(command: list[str], cwd: pathlib.Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOEGEN_STORE")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return next(out.glob("*.whl"))


def _install(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """A fresh environment with `requirement`; returns its bin folder."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    programs = folder / "bin"
    _run([sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", requirement], folder.parent)
    return programs


def test_wheel_contents(wheel: pathlib.Path) -> None:
    assert wheel.name == f"moegen-{moegen.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = archive.read(f"moegen-{moegen.__version__}.dist-info/METADATA").decode()
    expected = {"moegen/py.typed", "moegen/bench/run.py", "moegen/bench/contenders/worker.py", "moegen/report/page.py"}
    expected |= {"moegen/templates/bench/probe.cc", "moegen/templates/report/page.html.jinja"}
    for folder, prefix in (("moegen", ""), ("schedules", "moegen/"), ("templates", "moegen/"), ("tuning_logs", "moegen/")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {prefix + path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in packed if name.startswith("moegen/")} == expected
    assert not [name for name in packed if not name.startswith(("moegen/", f"moegen-{moegen.__version__}.dist-info/"))]
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in packed)


RUN = """
import importlib.util, json, sys
import moegen, numpy
layer = moegen.load(sys.argv[1], threads=2).bind(dict(numpy.load("weights.npz")))
y = layer(numpy.load("x.npy"))
numpy.save("y.npy", y)
compiler = [name for name in sys.argv[2:] if name in sys.modules or importlib.util.find_spec(name)]
print(json.dumps({"file": moegen.__file__, "compiler": compiler}))
"""


@pytest.mark.slow
def test_installed_without_the_compiler(
    wheel: pathlib.Path, tmp_path: pathlib.Path, built: Callable[..., moegen.Artifact], rng: np.random.Generator
) -> None:
    programs = _install(str(wheel), tmp_path / "venv")
    artifact = built(**TINY)
    weights = random_weights(artifact.config, rng)
    x = rng.standard_normal((17, 32), dtype=np.float32)
    np.savez(tmp_path / "weights.npz", **weights)  # type: ignore[arg-type]
    np.save(tmp_path / "x.npy", x)

    done = _run([str(programs / "python"), "-c", RUN, str(artifact.path), *COMPILER], tmp_path)
    said = json.loads(done.stdout)
    assert said["file"].startswith(str(tmp_path))
    assert said["compiler"] == []
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), moe(artifact.config, weights, x)[0], rtol=1e-3, atol=1e-5)

    command = str(programs / "moegen")
    listed = _run([command, "list", "--json", "--out", str(artifact.path.parent)], tmp_path)
    assert artifact.name in [row.get("name") for row in json.loads(listed.stdout)]
    assert "passed" in _run([command, "verify", str(artifact.path)], tmp_path).stdout
    for arguments in (["build"], ["emit"], ["tune"]):
        refused = _run([command, *arguments, "--experts", "4", "--top-k", "2", "--hidden", "32"], tmp_path, check=False)
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: ")
        assert refused.stderr.count("\n") == 1
        assert "pip install 'moegen[build]'" in refused.stderr


@pytest.mark.slow
def test_installed_with_the_compiler(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    programs = _install(f"{wheel}[build]", tmp_path / "venv")
    sizes = ["--experts", "4", "--top-k", "2", "--hidden", "32", "--intermediate", "32"]
    done = _run([str(programs / "moegen"), "build", *sizes, "--out", "layers", "--json"], tmp_path)
    (result,) = json.loads(done.stdout)["results"]
    assert result["verified"] == "passed"
    assert (tmp_path / result["path"] / "moe.so").is_file()


def _modules(code: str, folder: pathlib.Path) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\nprint('\\n'.join(sys.modules))"
    return set(_run([sys.executable, "-c", code], folder).stdout.split())


@pytest.mark.parametrize("loads", [False, True])
def test_import_budget(loads: bool, tmp_path: pathlib.Path, built: Callable[..., moegen.Artifact]) -> None:
    """What an import pulls in, rather than how long it takes: the compiler is installed here, and must not be touched."""
    path = str(built(**TINY).path)
    code = "import moegen\n" + (f"moegen.load({path!r}).bind\n" if loads else "")
    modules = _modules(code, tmp_path) - _modules("import numpy, tvm_ffi", tmp_path)  # tvm_ffi takes torch along where it is
    assert "moegen" in modules
    assert modules.isdisjoint(NOT_FOR_RUNNING)
    forbidden = {"moegen.builder", "moegen.compiler", "moegen.emission", "moegen.reference", "moegen.cli"}
    assert modules.isdisjoint(forbidden)


def test_command_line_does_not_import_the_compiler(tmp_path: pathlib.Path) -> None:
    modules = _modules("import moegen.cli", tmp_path)
    assert "click" in modules
    assert modules.isdisjoint((*COMPILER, "torch", "tvm_ffi", "moegen.builder", "moegen.tune.session"))
    assert modules.isdisjoint(("matplotlib", "PIL", "onnx", "onnxruntime", "moegen.report.page", "moegen.bench.run"))


@pytest.mark.parametrize("code", ["import moegen.torch", "from moegen.distributed import ExpertParallel"])
def test_what_needs_torch_says_so(code: str) -> None:
    done = run_python(f"import sys; sys.modules['torch'] = None; {code}")
    assert done.stderr.splitlines()[-1].endswith("needs torch, which is not installed: pip install 'moegen[torch]'")
