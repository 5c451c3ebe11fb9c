"""Calls of a layer on a CUDA device, each checked; run as a process of its own above the emulated driver (`test_cuda.py`).

Arguments: the artifact's folder. Prints one word for each check that passed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from helpers import assert_close, stored, tokens, values

import moegen
from moegen import reference
from moegen.device import DeviceLayer
from moegen.pack import pack

DRIVER = ctypes.CDLL("libcuda.so.1")


def launches_of(call: Any) -> tuple[int, int]:
    """(kernels launched, waits for the device) by a call."""
    before = DRIVER.moegen_emulated_launches(), DRIVER.moegen_emulated_waits()
    call()
    return DRIVER.moegen_emulated_launches() - before[0], DRIVER.moegen_emulated_waits() - before[1]


def on_device(layer: DeviceLayer, array: np.ndarray, dtype: str) -> Any:
    """A tensor in the device's memory, as another library would bring it."""
    return layer.module.upload(np.ascontiguousarray(array), dtype)


def host(layer: DeviceLayer, tensor: Any) -> np.ndarray:
    """float64 values of a device's tensor of bfloat16."""
    bits = np.empty(tuple(tensor.shape), np.uint16)
    layer.module.download(tensor, bits)
    return values(moegen.arrays.HostArray(bits, "bfloat16"))


def check_torch(layer: DeviceLayer) -> None:
    """What `moegen.torch` makes of a layer on a device, but for calls: those need torch with CUDA."""
    import torch

    from moegen.torch import MoELayer
    from moegen.torch.opening import from_packed_state, packed_state

    made = MoELayer(layer, name="on the device")
    assert made.bound.device == torch.device("cuda", 0)
    with pytest.raises(moegen.InputError, match="x is on device 'cpu', the layer is on 'cuda:0': move it"):
        made(torch.zeros(3, layer.config.hidden, dtype=made.bound.dtype))
    assert made(torch.zeros(3, layer.config.hidden, dtype=made.bound.dtype, device="meta")).shape == (3, layer.config.hidden)
    state = made.bound.__reduce__()[1][0]  # what a pickle holds
    twin = from_packed_state(*state)
    assert twin is not layer
    again = packed_state(twin)
    assert again[:-1] == state[:-1]
    assert np.array_equal(again[-1], state[-1])
    assert state[-1].any()


def main(path: str) -> None:
    """All checks."""
    rng = np.random.default_rng(7)
    module = moegen.load(path)
    config = module.config
    weights = reference.random_weights(config, rng)
    layer = module.bind(weights)
    x = tokens(config, 5, rng)
    given = stored(x, config.dtype)
    expected, routing = reference.moe(config, weights, x)

    y = layer(given)
    assert_close(config, values(y), expected)
    print("host")

    with tempfile.TemporaryDirectory() as folder:
        packed = pack(weights, pathlib.Path(folder) / "layer.moepack", module.artifact)
        mapped = module.bind(packed.path, verify=True)
    own = np.empty(layer.packed_bytes, np.uint8)
    module.download(layer.packed, own)
    assert np.array_equal(packed.payload, own), "packed without the device as on it"
    assert np.array_equal(values(mapped(given)), values(y))
    print("packed")

    tensor = on_device(layer, given.data, config.dtype)
    out = layer(tensor)
    assert isinstance(out, tvm_ffi.Tensor)
    assert tuple(out.shape) == x.shape
    assert (out.device.dlpack_device_type(), out.device.index) == (2, 0)
    assert np.array_equal(host(layer, out), values(y))
    three = layer(layer.module.view(tensor, (1, *x.shape)))
    assert tuple(three.shape) == (1, *x.shape)
    print("device")

    target = on_device(layer, np.full(x.shape, 0xFFFF, np.uint16), config.dtype)
    layer.forward_into(tensor, target)
    assert np.array_equal(host(layer, target), values(y))
    print("into")

    layer(on_device(layer, given.data[:1], config.dtype))  # its workspace is there then
    one = on_device(layer, given.data[:1], config.dtype)
    launched, waited = launches_of(lambda: layer(one))
    assert launched == 3, "routing, and the routed and the shared experts' two products together"
    assert waited == 0
    assert launches_of(lambda: layer(tensor))[1] == 0
    print("launches")

    result, decided = layer(tensor, return_routing=True)
    ids = np.empty((5, config.top_k), np.int32)
    layer.module.download(decided.ids, ids)
    assert np.array_equal(np.sort(ids), np.sort(routing.ids))
    assert np.array_equal(decided.load, routing.load)
    assert np.array_equal(host(layer, result), values(y))
    print("routing")

    chosen = rng.integers(config.experts, size=(20, config.top_k)).astype(np.int32)
    factors = rng.random((20, config.top_k)).astype(np.float32)
    some = tokens(config, 20, rng)
    alone = layer.experts(stored(some, config.dtype), chosen, factors)
    assert_close(config, values(alone), reference.experts(config, weights, some, chosen, factors))
    wrong = chosen.copy()
    wrong[3, 0], wrong[7, 1] = -1, config.experts
    outside = layer.experts(
        on_device(layer, stored(some, config.dtype).data, config.dtype),
        on_device(layer, wrong, "int32"),
        on_device(layer, factors, "float32"),
    )
    got = host(layer, outside)
    assert np.isnan(got[[3, 7]]).all()
    others = [t for t in range(20) if t not in (3, 7)]
    assert np.array_equal(got[others], values(alone)[others])
    print("experts")

    ones = np.ones(x.shape, np.float32)
    assert np.array_equal(values(layer(given, jitter=ones)), values(y))
    routed = layer.route(given, jitter=2 * ones)  # which is exact
    logits = reference.route(config, weights, 2 * x)
    assert np.array_equal(np.sort(routed.ids.data), np.sort(logits.ids))
    print("jitter")

    bare, scratch = (
        on_device(layer, np.full(x.shape, 0xFFFF, np.uint16), config.dtype),
        module.empty((layer.workspace_bytes(5),), "uint8"),
    )
    layer.run("forward", scratch, (tensor, None, bare), (None,) * 4)
    assert np.array_equal(host(layer, bare), values(y))
    print("bare")

    if importlib.util.find_spec("torch") is not None:  # whose tensors cannot be on this device, but its modules can
        check_torch(layer)
    print("torch")

    ragged = np.empty(given.data.size + 1, np.uint16)[1:].reshape(x.shape)  # of the host: at no multiple of anything
    ragged[...] = given.data
    assert np.array_equal(values(layer(moegen.arrays.HostArray(ragged, config.dtype))), values(y))
    print("ragged")

    for count in (2, 20):  # without row blocks, and with
        marked = some[:count].copy()
        clean = values(layer(stored(marked, config.dtype)))
        marked[1, 5] = np.nan
        spoilt = values(layer(stored(marked, config.dtype)))
        assert np.isnan(spoilt[1]).all()
        assert np.array_equal(np.delete(spoilt, 1, 0), np.delete(clean, 1, 0)), "a NaN touches its own token alone"
    print("nan")

    for call, reason in (
        (lambda: layer(np.zeros((2, config.hidden), np.float32)), "dtype float32"),
        (lambda: layer(stored(np.zeros((2, config.hidden + 1)), config.dtype)), "shape"),
        (lambda: layer(on_device(layer, np.zeros((2, config.hidden), np.float32), "float32")), "dtype float32"),
        (lambda: layer.experts(given, chosen, factors), "shape"),
        (lambda: layer.experts(stored(some, config.dtype), wrong, factors), "must be between 0 and"),
        (lambda: layer.workspace_bytes(-1), "tokens=-1"),
        (lambda: moegen.load(path, device=3), "device 3"),
    ):
        with pytest.raises(moegen.MoegenError, match=reason):
            call()
    functions = layer.module.functions  # as another program may call them
    for arguments, error, words in (
        ((1.5,), TypeError, r"argument 0 of moe_workspace_bytes must be int, not float"),
        ((), TypeError, r"moe_workspace_bytes takes 1 arguments, not 0"),
        ((-1,), ValueError, r"T=-1 must be between 0 and"),
    ):
        with pytest.raises(error, match=words):
            functions["workspace_bytes"](*arguments)
    with pytest.raises(TypeError, match=r"argument 1 of moe_copy must be .*Tensor.*, not None"):
        functions["copy"](bare, None, 0)
    print("errors")

    empty = layer(stored(np.zeros((0, config.hidden)), config.dtype))
    assert empty.shape == (0, config.hidden)
    print("empty")


if __name__ == "__main__":
    main(sys.argv[1])
