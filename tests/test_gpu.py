"""Compiled layers on a CUDA device: numbers, memory, streams, graphs, launches, devices, sizes beyond 32 bits.

Artifacts come from the folder that MOEGEN_GPU_ARTIFACTS names (`python -m moegen.field --only-build --artifacts FOLDER` fills one),
and are built where that has none and there is a compiler. No test here needs the compiler otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moegen
from moegen import verification
from moegen.cuda.device_count import devices
from moegen.device import DeviceLayer, DeviceModule
from moegen.errors import InputError
from moegen.field import stock
from moegen.field.cells import VARIANTS, WIDE
from moegen.field.checks import ARTIFACTS_VARIABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(devices() == 0, reason="there is no CUDA device here, or no NVIDIA driver"),
]
FEW_LAUNCHES = 4
SIZES = (1, 2, 8, 40, 600, 1600)  # every kind of kernel: for a few tokens, and each height of row blocks

Find = Callable[[str], moegen.Artifact]


@pytest.fixture(scope="module")
def torch() -> Any:
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip(f"torch {found.__version__} does not see the device")
    return found


@pytest.fixture(scope="module")
def find(store: pathlib.Path) -> Find:
    """The artifact of a layer by its name in `VARIANTS`, or `wide`."""
    folder = pathlib.Path(os.environ.get(ARTIFACTS_VARIABLE) or store)

    @functools.cache
    def artifact(name: str) -> moegen.Artifact:
        config = WIDE if name == "wide" else VARIANTS[name]
        if made := stock.of_layer(config, stock.found(folder)):
            return made[0]
        if importlib.util.find_spec("tvm") is None:
            pytest.skip(f"{folder} has no artifact of {name!r}, and there is no compiler here")
        return moegen.build(config, "cuda", folder, arch="sm_90a,sm_80", verify=False)

    return artifact


@pytest.fixture(scope="module")
def drawn(torch: Any, find: Find) -> Callable[[str], tuple[DeviceLayer, Any]]:
    """A layer on device 0 with random experts, and these as the float64 truth takes them."""
    from moegen.field import material

    @functools.cache
    def layer(name: str) -> tuple[DeviceLayer, Any]:
        artifact = find(name)
        weights = material.draw_weights(artifact.config, artifact.manifest, "cuda:0", 7)
        return DeviceModule(artifact, 0).layer(weights.blob), weights

    return layer


def batch_of(config: moegen.MoEConfig, tokens: int, seed: int = 1, routing: str = "zipf") -> Any:
    from moegen.field import material

    return material.draw_batches(config, tokens, routing, 1, "cuda:0", seed)[0]


def assert_true(weights: Any, batch: Any, y: Any, tokens: list[int] | None = None) -> None:
    """y against float64, at some tokens."""
    from moegen.field import truth

    chosen = truth.checked(len(batch.x)) if tokens is None else tokens
    error = truth.relative_l2(y[chosen], truth.expected(weights, batch, chosen))
    assert error <= truth.BOUNDS[weights.config.dtype], f"relative L2 error {error:.1e}"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", VARIANTS)
def test_the_proof_on_the_device(find: Find, name: str) -> None:
    report = verification.verify(find(name), tokens=(0, 1, 17, 1500), routings=("uniform", "skewed", "all_to_one", "ties"))
    assert report["status"] == "passed", (report["seed"], report["failures"])


def test_host_arrays_go_there_and_back(find: Find, rng: np.random.Generator) -> None:
    from moegen import reference

    artifact = find("float32")
    weights = reference.random_weights(artifact.config, rng)
    layer = moegen.load(artifact.path).bind(weights)
    x = rng.standard_normal((2, 9, artifact.config.hidden)).astype(np.float32)
    y = layer(x)
    assert isinstance(y, np.ndarray)
    expected = reference.moe(artifact.config, weights, x.reshape(18, -1))[0].reshape(x.shape)
    assert np.linalg.norm(y - expected) <= 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", SIZES)
def test_experts_are_those_of_the_truth(drawn: Any, torch: Any, tokens: int) -> None:
    layer, weights = drawn("gpt-oss-like")
    batch = batch_of(layer.config, tokens)
    assert_true(weights, batch, layer.experts(batch.x, batch.ids, batch.factors))


def test_ids_outside_are_not_a_number_and_disturb_nobody(drawn: Any, torch: Any) -> None:
    layer, weights = drawn("gpt-oss-like")
    for tokens in (4, 40):
        batch = batch_of(layer.config, tokens)
        right = layer.experts(batch.x, batch.ids, batch.factors)
        broken = batch.ids.clone()
        broken[2, 1] = layer.config.experts
        broken[3, 0] = -1
        y = layer.experts(batch.x, broken, batch.factors)
        assert y[2:4].isnan().all()
        others = [t for t in range(tokens) if t not in (2, 3)]
        if tokens > 8:
            assert_true(weights, batch, y, others[:8])
        else:
            assert torch.equal(y[others], right[others])


# ---------------------------------------------------------------- memory and streams


def test_torch_tensors_go_in_and_out_without_copies(drawn: Any, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = drawn("deepseek-like")
    x = batch_of(layer.config, 33).x
    out = torch.full_like(x, torch.nan)
    layer(x)
    met: list[list[int]] = []
    for name in ("forward", "experts"):
        function = layer._functions[name]

        def recorded(*given: Any, function: Callable[..., Any] = function) -> Any:
            met.append([one.data_ptr() for one in given if isinstance(one, torch.Tensor)])
            return function(*given)

        monkeypatch.setitem(layer._functions, name, recorded)
    for name in ("upload", "download"):
        monkeypatch.setattr(layer.module, name, lambda *given: pytest.fail("copied through host memory"))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    layer.forward_into(x, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1  # the scratch memory
    assert {x.data_ptr(), out.data_ptr(), layer.packed.data_ptr()} <= set(met[0])
    batch = batch_of(layer.config, 33)
    y = layer.experts(batch.x, batch.ids, batch.factors)
    assert {t.data_ptr() for t in (batch.x, batch.ids, batch.factors, y)} <= set(met[1])
    assert torch.equal(layer(x), out)
    assert torch.equal(layer(x.reshape(3, 11, -1)).reshape(x.shape), out)
    assert torch.equal(layer(x.t().contiguous().t()), out)


def test_the_callers_stream_is_used(drawn: Any, torch: Any) -> None:
    """What comes before in the stream, slowly, is seen: on any other stream the layer would read zeros."""
    layer, _ = drawn("gpt-oss-like")
    batch = batch_of(layer.config, 64)
    right = layer.experts(batch.x, batch.ids, batch.factors)
    for _ in range(3):
        x, stream = torch.zeros_like(batch.x), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            x.copy_(batch.x)
            y = layer.experts(x, batch.ids, batch.factors)
            assert not stream.query(), "the call waited for the device"
        stream.synchronize()
        assert torch.equal(y, right)


def test_two_streams_at_once(drawn: Any, torch: Any) -> None:
    """Each call has scratch memory of its own."""
    layer, _ = drawn("gpt-oss-like")
    batches = [batch_of(layer.config, 200, seed) for seed in range(4)]
    right = [layer.experts(b.x, b.ids, b.factors) for b in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        made = []
        for stream, b in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                made.append(layer.experts(b.x, b.ids, b.factors))
        torch.cuda.synchronize()
        assert all(torch.equal(y, r) for y, r in zip(made, right, strict=True))


# ---------------------------------------------------------------- graphs and launches


@pytest.mark.parametrize("name", ["gpt-oss-like", "deepseek-like"])
@pytest.mark.parametrize("tokens", SIZES)
def test_a_captured_call_is_the_call(drawn: Any, torch: Any, name: str, tokens: int) -> None:
    layer, _ = drawn(name)
    first, second = batch_of(layer.config, tokens, 1), batch_of(layer.config, tokens, 2)
    x, ids, factors = first.x.clone(), first.ids.clone(), first.factors.clone()
    layer.experts(x, ids, factors)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, whole = layer.experts(x, ids, factors), layer(x)
    for batch in (second, first):
        for to, value in ((x, batch.x), (ids, batch.ids), (factors, batch.factors)):
            to.copy_(value)
        y.fill_(torch.nan), whole.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer.experts(batch.x, batch.ids, batch.factors))
        assert torch.equal(whole, layer(batch.x))


@pytest.mark.parametrize("tokens", SIZES)
def test_nothing_waits_for_the_device(drawn: Any, torch: Any, tokens: int) -> None:
    layer, _ = drawn("gpt-oss-like")
    batch = batch_of(layer.config, tokens)
    layer.experts(batch.x, batch.ids, batch.factors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.experts(batch.x, batch.ids, batch.factors)
        layer(batch.x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["plain", "gpt-oss-like"])
def test_small_batches_take_few_launches(drawn: Any, torch: Any, name: str) -> None:
    from moegen.field.capture import GRAPH, Replay

    layer, _ = drawn(name)
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        pytest.skip(f"torch {torch.__version__} does not show a graph's nodes")
    for tokens in (1, 2):
        batch = batch_of(layer.config, tokens)
        for call in (functools.partial(layer.experts, batch.x, batch.ids, batch.factors), functools.partial(layer, batch.x)):
            replay = Replay([call])
            assert replay.mode == GRAPH
            assert replay.launches is not None
            assert 0 < sum(replay.launches.values()) <= FEW_LAUNCHES, replay.launches


# ---------------------------------------------------------------- devices


def test_other_devices_are_refused(drawn: Any, torch: Any) -> None:
    layer, _ = drawn("plain")
    count = torch.cuda.device_count()
    with pytest.raises(moegen.ArtifactError, match=f"runs on CUDA device {count}, and this machine has {count} of them"):
        DeviceModule(layer.module.artifact, count)
    batch = batch_of(layer.config, 3)
    with pytest.raises(InputError, match="ids must be a torch tensor"):
        layer.experts(batch.x, batch.ids.cpu().numpy(), batch.factors)
    if count > 1:
        with pytest.raises(InputError, match="x is on device 'cuda:1', the layer is on 'cuda:0'"):
            layer(batch.x.to("cuda:1"))


def test_a_layer_on_the_second_device(find: Find, torch: Any) -> None:
    from moegen.field import material

    if devices() < 2:
        pytest.skip("there is one device here")
    artifact = find("gpt-oss-like")
    weights = material.draw_weights(artifact.config, artifact.manifest, "cuda:1", 7)
    layer = DeviceModule(artifact, 1).layer(weights.blob)
    torch.cuda.set_device(0)
    (batch,) = material.draw_batches(artifact.config, 40, "uniform", 1, "cuda:1", 3)
    y = layer.experts(batch.x, batch.ids, batch.factors)
    assert torch.cuda.current_device() == 0
    assert y.device.index == 1
    assert_true(weights, batch, y)


# ---------------------------------------------------------------- sizes beyond 32 bits


@pytest.mark.slow
def test_sizes_beyond_32_bits(drawn: Any, find: Find, torch: Any) -> None:
    """More than 2**31 weights, and more than 2**31 values between the products: the last experts and tokens are right."""
    config = WIDE
    assert config.experts * 2 * config.intermediate * config.hidden > 2**31
    tokens = 2**31 // (config.top_k * config.hidden) + 1000
    find("wide")
    if torch.cuda.mem_get_info(0)[0] < 24e9:
        pytest.skip("needs 24 GB of free device memory")
    layer, weights = drawn("wide")
    last = torch.tensor([[config.experts - 1, *range(config.top_k - 1)]], dtype=torch.int32, device="cuda:0")
    for count in (1, 40):
        batch = batch_of(config, count)
        batch.ids[...] = last
        assert_true(weights, batch, layer.experts(batch.x, batch.ids, batch.factors))
    batch = batch_of(config, tokens, routing="uniform")
    y = layer.experts(batch.x, batch.ids, batch.factors)
    assert torch.isfinite(y).all()
    assert_true(weights, batch, y, [0, 1, tokens // 2, *range(tokens - 6, tokens)])
