"""The README's code blocks run, in order, as a newcomer would run them; what cannot run here is checked against the project."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from checkpoints import save
from helpers import environment

import moegen
from moegen import reference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
INSTALLS = re.compile(r"python3 -m venv \.venv && \. \.venv/bin/activate && pip install \S+ &&\n")
TESTS = next(text for _, text in BLOCKS if "pytest" in text)


@pytest.fixture
def newcomer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder, an empty store, and `moegen` and `python` on the path as after the first installation, without torch."""
    commands = tmp_path / "bin"
    commands.mkdir()
    python = f'"{sys.executable}"'
    programs = {
        "moegen": f"{python} -m moegen",
        "python": python,
        "torchrun": f"env PYTHONPATH='{ROOT}' {python} -m torch.distributed.run",  # with torch
        "tvm-ffi-config": f"{python} -m tvm_ffi.config",
    }
    for name, command in programs.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (commands / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("MOEGEN_STORE", str(tmp_path / "store"))
    return work


@pytest.mark.slow
def test_blocks_run_in_order(newcomer: pathlib.Path) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    _write_checkpoint(newcomer / "model.safetensors", bfloat16)
    namespace: dict[str, Any] = {}
    printed = []
    for language, text in BLOCKS:
        if language == "python" and "torch." in text and importlib.util.find_spec("torch") is None:
            continue
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)
        elif language in ("cpp", "c"):
            (newcomer / re.match(r"/[/*] ([\w.]+):", text)[1]).write_text(text)  # type: ignore[index]
        elif text != TESTS:
            script = INSTALLS.sub("", text)
            assert "pip " not in script
            if "torchrun" in script and importlib.util.find_spec("torch") is None:
                continue
            done = subprocess.run(["bash", "-e", "-c", script], cwd=newcomer, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout + done.stderr)
    first = printed[0]
    assert re.search(r"built in [\d.]+ s, verified \(worst relative L2 error", first)
    assert "output (1024, 512) float32" in first
    assert float(first.split("relative error against float64:")[1]) < 3e-6
    assert any("skipped experts=2: top_k=4 must be between" in text for text in printed)


def _write_checkpoint(path: pathlib.Path, dtype: Any) -> None:
    """The checkpoint of a newcomer's model: the layer of the README's config.json, as Mixtral names it."""
    weights = reference.random_weights(moegen.MoEConfig(experts=8, top_k=2, hidden=256, intermediate=448), np.random.default_rng(3))
    block = "model.layers.3.block_sparse_moe."
    tensors = {f"{block}gate.weight": weights["router.weight"]}
    for short, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        tensors |= {f"{block}experts.{e}.{short}.weight": w for e, w in enumerate(weights[f"experts.{name}.weight"])}
    save(path, {name: w.astype(dtype) for name, w in tensors.items()})


def test_every_block_is_known() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh", "cpp", "c"}
    assert README.count("```") == 2 * len(BLOCKS)
    assert any(INSTALLS.match(text) for _, text in BLOCKS)


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for extras in re.findall(r"\.\[([\w,]+)\]", README) for extra in extras.split(",")}
    assert {"build", "dev", "transformers"} <= named <= set(project["optional-dependencies"])
    torch = next(d for d in project["optional-dependencies"]["transformers"] if d.startswith("torch"))
    assert f"pip install {torch} " in TESTS


def test_ci_runs_the_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [part.strip() for part in TESTS.split("&&")][2:]  # without the environment, which is a temporary one there
    assert commands == ["pip install torch==2.13.0", "pip install -e '.[transformers,dev]'", "pytest -n 3 --dist worksteal"]
    assert [line for line in lines if line in commands] == commands
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_named_files_exist() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\.ci/run)`", README)
    assert "moegen/reference.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_changelog_has_this_version() -> None:
    assert f"## [{moegen.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
