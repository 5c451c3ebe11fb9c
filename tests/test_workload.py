"""Workloads: what is drawn, how popular the experts are, what a call has to do, and what its output should be."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

import moegen
from moegen import ConfigError, reference
from moegen.arrays import to_float32
from moegen.bench import workload
from moegen.bench.contenders.family import Settings
from moegen.bench.contenders.numpy_layer import NumpyLayer
from moegen.config import weight_shapes

SMALL: dict[str, Any] = {"experts": 8, "top_k": 2, "hidden": 48, "intermediate": 32}
LAYERS: dict[str, dict[str, Any]] = {
    "seed": {"activation": "relu"},
    "olmoe": {"renormalize": False, "dtype": "bfloat16"},
    "gpt-oss": {
        "activation": "swiglu_clamped", "gating": "topk_softmax", "router_bias": True, "expert_bias": True, "swiglu_limit": 1.0,
    },
    "deepseek-v3": {
        "gating": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 2, "shared_intermediate": 40,
        "routed_scaling": 2.5,
    },
    "deepseek-v2": {"n_group": 4, "topk_group": 2, "group_score": "max", "renormalize": False},
    "qwen2": {"shared_intermediate": 24, "shared_gate": True, "dtype": "float16"},
    "llama4": {"gating": "sigmoid", "weight_on_input": True, "renormalize": False, "activation": "geglu"},
    "nemotron": {"activation": "relu2", "gating": "sigmoid", "correction_bias": True, "shared_intermediate": 16},
    "gelu": {"activation": "gelu", "routed_scaling": 0.5},
    "gelu_tanh": {"activation": "gelu_tanh", "routed_scaling": 0.5},
}  # fmt: skip
BOUNDS = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


def make(folder: pathlib.Path, tokens: int = 20, routing: str = "uniform", **fields: Any) -> moegen.MoEConfig:
    config = moegen.MoEConfig(**SMALL | fields)
    workload.make(folder, config, routing, 7)
    workload.make_batches(folder, config, tokens, 7)
    return config


def errors_of(family: Any, folder: pathlib.Path, tokens: int) -> dict[str, float]:
    """Relative L2 errors of every contender of a family, all batches, poisoned outputs."""
    from moegen.bench.contenders.worker import Worker

    worker = Worker(family)
    worker.point(tokens)
    _, checks = workload.study(folder, tokens)
    expected = np.concatenate(checks.expected)
    found = {}
    for name in family.calls:
        worker.check(name, checks.rows, str(folder / "out.npy"))
        out = np.load(folder / "out.npy")
        found[name] = float(np.linalg.norm(out - expected[: len(out)]) / np.linalg.norm(expected[: len(out)]))
    return found


# ---------------------------------------------------------------- what is drawn


def test_weights_are_those_of_the_layer(tmp_path: pathlib.Path) -> None:
    config = make(tmp_path, **LAYERS["deepseek-v3"], dtype="bfloat16")
    assert workload.read_layer(tmp_path) == config
    weights = workload.read_weights(tmp_path)
    assert {name: array.shape for name, array in weights.items()} == weight_shapes(config)
    assert weights["router.correction_bias"].dtype == "float32"
    up = to_float32(weights["experts.up.weight"])
    assert np.std(up) == pytest.approx(48**-0.5, rel=0.05)
    assert not np.array_equal(up[0], up[1])


def test_same_seed_same_workload(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_batches_differ_and_go(tmp_path: pathlib.Path) -> None:
    config = make(tmp_path, tokens=1)
    batches = workload.read_batches(tmp_path, 1)
    assert len(batches) == 16
    assert len({batch.data.tobytes() for batch in batches}) == 16
    assert batches[0].shape == (1, config.hidden)
    workload.remove_batches(tmp_path, 1)
    assert workload.read_batches(tmp_path, 1) == []


def test_zipf_makes_some_experts_popular(tmp_path: pathlib.Path) -> None:
    loads = {}
    for routing in ("uniform", "zipf"):
        make(tmp_path / routing, 2000, routing, experts=32, hidden=64)
        loads[routing] = np.sort(workload.study(tmp_path / routing, 2000)[0].expert_load)[::-1]
    assert loads["uniform"].sum() == loads["zipf"].sum() == 2 * 2000 * 2
    assert loads["uniform"][0] < 2.5 * loads["uniform"].mean()
    assert loads["zipf"][0] > 4 * loads["zipf"].mean()
    slope = np.polyfit(np.log(np.arange(1, 17)), np.log(loads["zipf"][:16]), 1)[0]
    assert -1.6 < slope < -0.6


def test_unknown_routing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="routing='even' must be one of uniform, zipf"):
        workload.make(tmp_path, moegen.MoEConfig(**SMALL), "even", 0)


# ---------------------------------------------------------------- what a call has to do


def test_work(tmp_path: pathlib.Path) -> None:
    make(tmp_path, 1, shared_intermediate=10)
    work, _ = workload.study(tmp_path, 1)
    assert work.active_experts == 2
    assert work.flops == 2 * 48 * (3 * (2 * 32 + 10) + 8)
    assert work.weight_bytes == 4 * 48 * (3 * (2 * 32 + 10) + 8)
    assert sum(work.expert_load) == 16 * 2


def test_work_within_capacity(tmp_path: pathlib.Path) -> None:
    make(tmp_path, 100, "zipf", capacity_factor=0.5)
    work, _ = workload.study(tmp_path, 100)
    assert sum(work.expert_load) == 2 * 200, "the load is what was asked for"
    assert work.flops < 2 * 48 * (3 * 100 * 32 + 100 * 8) + 1, "the work is what was kept"


@pytest.mark.parametrize("fields", [*LAYERS.values(), {"capacity_factor": 0.5}], ids=[*LAYERS, "capacity"])
def test_answers_are_the_references(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    config = make(tmp_path, **fields)
    _, checks = workload.study(tmp_path, 20)
    weights = {name: to_float32(array) for name, array in workload.read_weights(tmp_path).items()}
    for batch, rows, expected in zip(workload.read_batches(tmp_path, 20), checks.rows, checks.expected, strict=True):
        y, _ = reference.moe(config, weights, to_float32(batch))
        np.testing.assert_allclose(expected, y[rows], rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- contenders


@pytest.mark.parametrize("name", LAYERS)
def test_numpy_contenders(tmp_path: pathlib.Path, name: str) -> None:
    config = make(tmp_path, **LAYERS[name])
    errors = errors_of(NumpyLayer(Settings(tmp_path, 2, "")), tmp_path, 20)
    assert list(errors) == ["numpy-naive", "numpy-grouped"]
    assert max(errors.values()) < BOUNDS[config.dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_torch_contenders(tmp_path: pathlib.Path, name: str) -> None:
    pytest.importorskip("torch", reason="the contenders of torch need torch==2.13.0, the CPU build")
    from moegen.bench.contenders.onednn_layer import OnednnLayer
    from moegen.bench.contenders.torch_layer import TorchLayer

    config = make(tmp_path, **LAYERS[name])
    eager = TorchLayer(Settings(tmp_path, 2, ""))
    eager.calls.pop("torch-compiled")  # minutes for all of these layers; the benchmark's own test compiles one
    errors = errors_of(eager, tmp_path, 20)
    packed = OnednnLayer(Settings(tmp_path, 2, ""))
    errors |= errors_of(packed, tmp_path, 20)
    assert {"torch-loop", "torch-grouped"} <= set(errors)
    assert ("torch-onednn" in errors) != ("torch-onednn" in packed.obstacles)
    assert "torch-onednn" in errors or config.dtype != "float32", packed.obstacles  # not every processor has oneDNN's 16 bits
    assert max(errors.values()) < BOUNDS[config.dtype], errors


ONNX_REFUSES = {
    "olmoe": "takes float32 on a CPU, not bfloat16",
    "deepseek-v3": "no sigmoid gating",
    "deepseek-v2": "no routing groups",
    "qwen2": "takes float32 on a CPU, not float16",
    "llama4": "no geglu",
    "nemotron": "no relu2",
    "gelu": "no gelu",
}


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_contender(tmp_path: pathlib.Path, name: str) -> None:
    pytest.importorskip("onnxruntime", reason="the contender of ONNX Runtime needs onnxruntime")
    pytest.importorskip("onnx", reason="the contender of ONNX Runtime needs onnx")
    from moegen.bench.contenders.onnx_layer import OnnxLayer

    make(tmp_path, **LAYERS[name])
    family = OnnxLayer(Settings(tmp_path, 2, ""))
    if name in ONNX_REFUSES:
        assert family.calls == {}
        assert ONNX_REFUSES[name] in family.obstacles["onnxruntime"]
    else:
        assert errors_of(family, tmp_path, 20)["onnxruntime"] < 1e-5


def test_nobody_else_has_a_capacity(tmp_path: pathlib.Path) -> None:
    make(tmp_path, capacity_factor=1.0)
    family = NumpyLayer(Settings(tmp_path, 2, ""))
    assert family.calls == {}
    assert set(family.obstacles.values()) == {"has no expert capacity"}
