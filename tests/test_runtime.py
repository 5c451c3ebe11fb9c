"""Loading, binding and calling: what comes in, what is refused, threads, processes, and the raw exported functions."""

from __future__ import annotations

import gc
import json
import pathlib
import struct
import threading
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import SMALL, TINY, assert_close, bits, run_python, stored, tokens

import moegen
from moegen import InputError, WeightsError, reference
from moegen.arrays import HostArray, empty_aligned, is_aligned

E, K, H, I = 4, 2, 64, 96  # noqa: E741


@pytest.fixture(scope="module")
def module(built: Any) -> moegen.Module:
    return moegen.load(built(verify=False, **SMALL).path, threads=2)


@pytest.fixture(scope="module")
def weights(module: moegen.Module) -> dict[str, np.ndarray]:
    return reference.random_weights(module.config, np.random.default_rng(1))


@pytest.fixture(scope="module")
def layer(module: moegen.Module, weights: dict[str, np.ndarray]) -> moegen.Layer:
    return module.bind(weights)


@pytest.fixture(scope="module")
def half_module(built: Any) -> moegen.Module:
    """A bfloat16 layer."""
    return moegen.load(built(verify=False, **SMALL, dtype="bfloat16").path, threads=2)


@pytest.fixture(scope="module")
def half(half_module: moegen.Module) -> moegen.Layer:
    return half_module.bind(reference.random_weights(half_module.config, np.random.default_rng(2)))


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((17, H)).astype(np.float32)


def misaligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts 4 bytes after a multiple of 64."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + array.itemsize
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert not is_aligned(copy)
    return copy


# ---------------------------------------------------------------- inputs


def test_shapes_and_kinds(layer: moegen.Layer, x: np.ndarray) -> None:
    y = layer(x)
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float32
    assert y.shape == x.shape
    assert y.flags.c_contiguous
    assert y.flags.writeable
    cube = layer(x[:15].reshape(3, 5, H))
    assert cube.shape == (3, 5, H)
    np.testing.assert_array_equal(cube.reshape(15, H), y[:15])
    assert isinstance(layer(stored(x, "float32")), HostArray)


def test_the_input_is_not_touched(layer: moegen.Layer, x: np.ndarray) -> None:
    before = x.copy()
    layer(x, jitter=np.full_like(x, 1.5))
    np.testing.assert_array_equal(x, before)


VIEWS = {
    "misaligned": misaligned,
    "fortran": np.asfortranarray,
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "transposed": lambda x: x.T.copy().T,
    "big-endian": lambda x: x.astype(">f4"),
    "matrix": np.asmatrix,
    "bytes": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, layer: moegen.Layer, x: np.ndarray) -> None:
    """Misaligned, strided, read-only and byte-swapped inputs are copied where they have to be."""
    given = VIEWS[view](x)
    np.testing.assert_array_equal(layer(given), layer(x))
    y, routing = layer(given, return_routing=True, jitter=given)
    again, expected = layer(x, return_routing=True, jitter=x)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(routing.ids, expected.ids)
    np.testing.assert_array_equal(
        layer.experts(given, routing.ids, routing.weights), layer.experts(x, expected.ids, expected.weights)
    )
    given_cube = VIEWS[view](x[:16].copy()).reshape(2, 8, H) if view != "matrix" else x[:16].reshape(2, 8, H)
    np.testing.assert_array_equal(layer(given_cube).reshape(16, H), layer(x)[:16])


def test_read_only(layer: moegen.Layer, x: np.ndarray) -> None:
    y = layer(x)
    frozen = empty_aligned(x.shape, np.float32)
    frozen[...] = x
    frozen.flags.writeable = False
    np.testing.assert_array_equal(layer(frozen), y)
    np.testing.assert_array_equal(layer(np.broadcast_to(x[0], (5, H))), np.tile(y[0], (5, 1)))
    routing = layer.route(frozen)
    for array in (routing.ids, routing.weights):
        array.flags.writeable = False
    np.testing.assert_array_equal(
        layer.experts(frozen, routing.ids, routing.weights), layer.experts(x, routing.ids.copy(), routing.weights.copy())
    )


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_narrower_inputs_are_widened(kind: Any, layer: moegen.Layer, x: np.ndarray) -> None:
    narrow = x.astype(kind)
    y = layer(narrow)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, layer(narrow.astype(np.float32)))
    np.testing.assert_array_equal(layer(narrow[::-1]), y[::-1])


def test_bfloat16(half: moegen.Layer, x: np.ndarray) -> None:
    given = x.astype(ml_dtypes.bfloat16)
    y, routing = half(given, return_routing=True)
    assert y.dtype == ml_dtypes.bfloat16
    assert routing.weights.dtype == np.float32
    np.testing.assert_array_equal(y.view(np.uint16), half(stored(x, "bfloat16")).data)
    cube = half(given[:16].reshape(4, 4, H))
    assert cube.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(cube.reshape(16, H).view(np.uint16), y[:16].view(np.uint16))
    np.testing.assert_array_equal(half(misaligned(given)).view(np.uint16), y.view(np.uint16))
    given.flags.writeable = False
    np.testing.assert_array_equal(half(given).view(np.uint16), y.view(np.uint16))
    out = np.empty_like(y)
    half.forward_into(given, out)
    np.testing.assert_array_equal(out.view(np.uint16), y.view(np.uint16))


def test_dlpack(layer: moegen.Layer, x: np.ndarray) -> None:
    import tvm_ffi

    y, routing = layer(tvm_ffi.from_dlpack(x), return_routing=True)
    np.testing.assert_array_equal(np.from_dlpack(y), layer(x))
    np.testing.assert_array_equal(np.from_dlpack(routing.ids), layer.route(x).ids)
    out = np.empty_like(x)
    layer.forward_into(tvm_ffi.from_dlpack(x), tvm_ffi.from_dlpack(out))
    np.testing.assert_array_equal(out, layer(x))


class OnDevice:
    """An array that says that it is on a GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, **_: Any) -> None:
        raise AssertionError("must not be asked")


REFUSED: dict[str, tuple[Any, str]] = {
    "list": ([[0.0] * H], "x must be a NumPy array.*not list"),
    "None": (None, "x must be a NumPy array"),
    "number": (1.0, "x must be a NumPy array"),
    "text": ("x", "x must be a NumPy array"),
    "device": (OnDevice(), "cuda:1.*move it to the CPU"),
    "float64": (np.zeros((2, H)), "dtype float64.*takes float32"),
    "integers": (np.zeros((2, H), np.int32), "dtype int32"),
    "booleans": (np.zeros((2, H), bool), "dtype bool"),
    "complex": (np.zeros((2, H), np.complex64), "dtype complex64"),
    "objects": (np.zeros((2, H), object), "dtype object"),
    "masked": (np.ma.zeros((2, H), np.float32), "masked"),
    "vector": (np.zeros(H, np.float32), r"shape \[64\], expected \[T, 64\]"),
    "scalar": (np.float32(0), r"shape \[\]"),
    "four dimensions": (np.zeros((1, 1, 1, H), np.float32), r"shape \[1, 1, 1, 64\]"),
    "too narrow": (np.zeros((2, H - 1), np.float32), r"shape \[2, 63\]"),
    "too wide": (np.zeros((2, 2, H + 1), np.float32), r"shape \[2, 2, 65\]"),
    "no width": (np.zeros((2, 0), np.float32), r"shape \[2, 0\]"),
    "too many": (np.broadcast_to(np.float32(0), (2**31, H)), "2147483648 tokens; this layer takes at most 1073741823"),
    "too many narrow ones": (np.broadcast_to(np.float16(0), (2**31, H)), "2147483648 tokens; this layer takes at most 1073741823"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_inputs(what: str, layer: moegen.Layer) -> None:
    value, message = REFUSED[what]
    some = np.zeros((2, H), np.float32)
    ids, factors = np.zeros((2, K), np.int32), np.zeros((2, K), np.float32)
    calls = [lambda: layer(value), lambda: layer.route(value), lambda: layer.forward_into(value, some)]
    for call in (*calls, lambda: layer.experts(value, ids, factors)):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    if what not in ("float64", "integers", "booleans"):
        with pytest.raises(InputError):
            layer(some, jitter=value) if value is not None else layer.experts(some, value, factors)


def test_bfloat16_takes_no_other_types(half: moegen.Layer, x: np.ndarray) -> None:
    for wrong in (x, x.astype(np.float16), x.astype(np.uint16), x.astype(np.float64)):
        with pytest.raises(InputError, match="takes bfloat16: convert it first"):
            half(wrong)


@pytest.mark.parametrize("shape", [(0, H), (0, 5, H), (3, 0, H), (0, 0, H)])
def test_no_tokens(shape: tuple[int, ...], layer: moegen.Layer, half: moegen.Layer) -> None:
    for one, dtype in ((layer, np.float32), (half, ml_dtypes.bfloat16)):
        empty = np.zeros(shape, dtype)
        y, routing = one(empty, return_routing=True, jitter=np.zeros(shape, np.float32))
        assert y.shape == shape
        assert y.dtype == dtype
        assert routing.ids.shape == routing.weights.shape == (0, K)
        assert routing.load.tolist() == [0] * E
        assert routing[3:] == (0, 0.0, 0.0, 0.0)
        assert one.route(empty).ids.shape == (0, K)
        assert one.experts(empty, routing.ids, routing.weights).shape == shape
        one.forward_into(empty, np.zeros(shape, dtype))
        one.forward_into(empty[::-1], np.zeros(shape, dtype)[::-1])


# ---------------------------------------------------------------- outputs


OUTS = {
    "aligned": lambda shape: empty_aligned(shape, np.float32),
    "misaligned": lambda shape: misaligned(np.zeros(shape, np.float32)),
    "fortran": lambda shape: np.zeros(shape, np.float32, order="F"),
    "strided": lambda shape: np.zeros((2 * shape[0], shape[1] + 3), np.float32)[::2, 3:],
    "backwards": lambda shape: np.zeros(shape, np.float32)[::-1],
}


@pytest.mark.parametrize("kind", OUTS)
def test_forward_into(kind: str, layer: moegen.Layer, x: np.ndarray) -> None:
    out = OUTS[kind](x.shape)
    out[...] = np.nan
    layer.forward_into(x, out)
    np.testing.assert_array_equal(out, layer(x))


def test_forward_into_writes_nowhere_else(layer: moegen.Layer, x: np.ndarray) -> None:
    room = empty_aligned((37, H), np.float32)
    room[...] = 7.0
    layer.forward_into(x, room[10:27])
    assert (room[:10] == 7).all()
    assert (room[27:] == 7).all()
    np.testing.assert_array_equal(room[10:27], layer(x))
    cube = empty_aligned((3, 5, H), np.float32)
    layer.forward_into(x[:15].reshape(3, 5, H), cube)
    np.testing.assert_array_equal(cube.reshape(15, H), layer(x[:15]))


@pytest.mark.parametrize("shift", [-3, 0, 5])
def test_forward_into_an_overlapping_output(shift: int, layer: moegen.Layer, x: np.ndarray) -> None:
    """The same memory, or some rows earlier or later: the result is that of separate arrays."""
    expected = layer(x)
    room = empty_aligned((40, H), np.float32)
    source, out = room[10:27], room[10 + shift : 27 + shift]
    source[...] = x
    layer.forward_into(source, out)
    np.testing.assert_array_equal(out, expected)


def test_forward_into_a_big_endian_output(layer: moegen.Layer, x: np.ndarray) -> None:
    """Written or refused, but never silently left as it was."""
    out = np.full(x.shape, 7.0, ">f4")
    try:
        layer.forward_into(x, out)
    except InputError:
        return
    np.testing.assert_array_equal(out, layer(x))


def test_forward_into_refuses(layer: moegen.Layer, half: moegen.Layer, x: np.ndarray) -> None:
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    for out, message in (
        (frozen, "read-only"),
        (np.broadcast_to(np.float32(0), x.shape), "read-only"),
        (np.zeros(x.shape), "dtype float64, the layer writes float32"),
        (np.zeros(x.shape, np.float16), "dtype float16"),
        (np.zeros((17, H + 1), np.float32), r"shape \[17, 65\], x has \[17, 64\]"),
        (np.zeros((1, 17, H), np.float32), r"shape \[1, 17, 64\]"),
        (np.zeros((18, H), np.float32), r"shape \[18, 64\]"),
        ([[0.0] * H] * 17, "out must be a NumPy array"),
        (None, "out must be a NumPy array"),
    ):
        with pytest.raises(InputError, match=message):
            layer.forward_into(x, out)
    with pytest.raises(InputError, match="dtype uint16, the layer writes bfloat16"):
        half.forward_into(x.astype(ml_dtypes.bfloat16), np.zeros(x.shape, np.uint16))


# ---------------------------------------------------------------- the router and the experts alone


def test_route_and_experts_make_the_layer(layer: moegen.Layer, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    y, routing = layer(x, return_routing=True)
    alone = layer.route(x)
    np.testing.assert_array_equal(alone.ids, routing.ids)
    np.testing.assert_array_equal(alone.weights, routing.weights)
    assert isinstance(alone.dropped, int)
    assert alone[3:] == routing[3:]
    np.testing.assert_array_equal(layer.experts(x, routing.ids, routing.weights), y)
    np.testing.assert_array_equal(
        layer.experts(x[:16].reshape(2, 8, H), routing.ids[:16], routing.weights[:16]).reshape(16, H), y[:16]
    )
    expected, _ = reference.moe(layer.config, weights, x)
    assert_close(layer.config, y.astype(np.float64), expected)
    for kind in (np.int64, np.uint8, ">i4"):
        np.testing.assert_array_equal(layer.experts(x, routing.ids.astype(kind), routing.weights.astype(np.float64)), y)


def test_experts_refuse(layer: moegen.Layer, x: np.ndarray) -> None:
    ids, factors = np.zeros((17, K), np.int32), np.ones((17, K), np.float32)

    def changed(value: int, dtype: Any = np.int64) -> np.ndarray:
        wrong = ids.astype(dtype)
        wrong[3, 1] = value
        return wrong

    for bad_ids, message in (
        (changed(4), r"ids\[3, 1\]=4 must be between 0 and 3"),
        (changed(-1), r"ids\[3, 1\]=-1 must be"),
        (changed(4, np.int32), r"ids\[3, 1\]=4 must be between 0 and 3"),
        (changed(-1, np.int32), r"ids\[3, 1\]=-1 must be"),
        (changed(2**40), "ids.*1099511627776 must be"),
        (changed(2**63, np.uint64), "ids.*must be"),
        (ids.astype(np.float32), "ids must be integers, not float32"),
        (ids.astype(bool), "ids must be integers, not bool"),
        (ids[:16], r"ids has shape \[16, 2\], expected \[17, 2\]"),
        (ids[:, :1], r"ids has shape \[17, 1\]"),
        (ids.tolist(), "ids must be a NumPy array"),
    ):
        with pytest.raises(InputError, match=message):
            layer.experts(x, bad_ids, factors)
    for bad_factors, message in (
        (factors[:1], r"weights has shape \[1, 2\]"),
        (ids, "floating-point"),
        (factors.astype(complex), "complex"),
        (None, "weights must be a NumPy array"),
    ):
        with pytest.raises(InputError, match=message):
            layer.experts(x, ids, bad_factors)


def test_jitter_is_checked(layer: moegen.Layer, x: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"jitter has shape \[17, 1\], x has \[17, 64\]"):
        layer(x, jitter=np.ones((17, 1), np.float32))
    with pytest.raises(InputError, match="jitter must be a NumPy array"):
        layer(x, jitter=1.0)
    with pytest.raises(InputError, match="floating-point"):
        layer(x, jitter=np.ones(x.shape, np.int32))
    half_jitter = np.ones(x.shape, np.float16)
    np.testing.assert_array_equal(layer(x, jitter=half_jitter), layer(x))
    np.testing.assert_array_equal(layer.route(x, jitter=half_jitter).ids, layer.route(x).ids)


# ---------------------------------------------------------------- sizes and threads


def test_workspace_bytes(layer: moegen.Layer) -> None:
    sizes = [layer.workspace_bytes(count) for count in (0, 1, 2, 3, 17, 100, 112, 113, 1000, 10**6)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 0
    assert isinstance(sizes[0], int)
    assert layer.workspace_bytes(np.int64(17)) == sizes[4]
    limit = layer.module.artifact.manifest["max_tokens"]
    assert limit == (2**31 - 1) // K
    assert layer.workspace_bytes(limit) > sizes[-1]
    for wrong in (-1, limit + 1, 2**70):
        with pytest.raises(InputError, match="must be between 0 and 1073741823"):
            layer.workspace_bytes(wrong)
    for odd in (1.5, "3", None, [1]):
        with pytest.raises(InputError):
            layer.workspace_bytes(odd)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.0, "2", True, False, [1], float("nan"), 10**30])
def test_threads_are_checked(threads: Any, module: moegen.Module, weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match=r"threads=.* must be an integer between 1 and 1024"):
        moegen.load(module.artifact.path, threads=threads)
    with pytest.raises(InputError, match="threads="):
        module.bind(weights, threads=threads)


def test_threads_per_layer(module: moegen.Module, weights: dict[str, np.ndarray], layer: moegen.Layer, x: np.ndarray) -> None:
    assert module.bind(weights).threads == 2
    assert moegen.load(module.artifact.path).threads >= 1
    for threads in (1, 5, 64):
        other = module.bind(weights, threads=threads)
        assert other.threads == threads
        np.testing.assert_array_equal(other(x), layer(x))


def test_repr(layer: moegen.Layer) -> None:
    assert repr(layer.module) == f"Module({layer.module.artifact.name})"
    assert repr(layer) == f"Layer({layer.module.artifact.name}, threads=2)"
    assert layer.packed_bytes == layer.module.artifact.manifest["packed_bytes"]


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_call_at_once(
    threads: int, module: moegen.Module, half_module: moegen.Module, weights: dict[str, np.ndarray]
) -> None:
    """One layer by six threads, another of the same module and one of another module by two each: all as if alone."""
    first, second = module.bind(weights, threads=threads), module.bind({n: -w for n, w in weights.items()}, threads=threads)
    third = half_module.bind(reference.random_weights(half_module.config, np.random.default_rng(3)), threads=threads)
    callers = [first] * 6 + [second] * 2 + [third] * 2
    inputs = [stored(tokens(c.config, 40 + 37 * i, np.random.default_rng(i)), c.config.dtype) for i, c in enumerate(callers)]
    expected = [bits(c(v)) for c, v in zip(callers, inputs, strict=True)]
    wrong: list[str] = []
    start = threading.Barrier(len(callers))

    def call(index: int) -> None:
        start.wait()
        for n in range(60):
            y, routing = callers[index](inputs[index], return_routing=True)
            if not np.array_equal(bits(y), expected[index]):
                wrong.append(f"caller {index}, call {n}")
            if routing.load.sum() != K * len(inputs[index].data):
                wrong.append(f"caller {index}, call {n}: load")

    workers = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(callers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive(), "a caller hangs"
    assert not wrong


def test_binding_while_calling(module: moegen.Module, layer: moegen.Layer, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    """Packing shares the pool with the calls of other layers."""
    expected = layer(x)
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            if not np.array_equal(layer(x), expected):
                wrong.append("changed")

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    for _ in range(20):
        np.testing.assert_array_equal(module.bind(weights)(x), expected)
    stop.set()
    caller.join(30)
    assert not wrong


# ---------------------------------------------------------------- weights


def test_weights_of_other_types(
    module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray, half_module: moegen.Module
) -> None:
    y = module.bind(weights)(x)
    frozen = {name: np.frombuffer(w.tobytes(), w.dtype).reshape(w.shape) for name, w in weights.items()}
    odd = {name: misaligned(np.asfortranarray(w)) for name, w in weights.items()}
    swapped = {name: w.astype(">f4") for name, w in weights.items()}
    for given in (frozen, odd, swapped, {n: w.astype(np.float64) for n, w in weights.items()}):
        np.testing.assert_array_equal(module.bind(given)(x), y)
    transposed = {n: w.swapaxes(-1, -2) if w.ndim == 3 else w for n, w in weights.items()}
    strided = {n: w.swapaxes(-1, -2).copy().swapaxes(-1, -2) for n, w in weights.items()}
    np.testing.assert_array_equal(module.bind(transposed, layout="input_first")(x), y)
    np.testing.assert_array_equal(module.bind(strided)(x), y)
    narrow = {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()}
    exact = {n: w.astype(np.float32) for n, w in narrow.items()}
    np.testing.assert_array_equal(module.bind(narrow)(x), module.bind(exact)(x))


def test_wider_weights_are_rounded(half_module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    """As `bind` says: to the layer's type, to nearest even, the router too."""
    given = x.astype(ml_dtypes.bfloat16)
    rounded = {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()}
    expected, routing = half_module.bind(rounded)(given, return_routing=True)
    for wide in (weights, {n: w.astype(np.float64) for n, w in weights.items()}):
        y, wide_routing = half_module.bind(wide)(given, return_routing=True)
        np.testing.assert_array_equal(wide_routing.weights, routing.weights)
        np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))


def test_bound_weights_are_a_copy(module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    mine = {name: w.copy() for name, w in weights.items()}
    layer = module.bind(mine)
    y = layer(x)
    for w in mine.values():
        w[...] = np.nan
    np.testing.assert_array_equal(layer(x), y)


def test_weights_errors(module: moegen.Module, weights: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    down = "experts.down.weight"
    for given, message in (
        ({n: w for n, w in weights.items() if n != down}, "'experts.down.weight' is missing"),
        (weights | {"experts.down.bias": np.zeros((E, H), np.float32)}, "expert_bias is False"),
        (weights | {"surplus": np.zeros(3, np.float32)}, "unknown weight names: surplus"),
        (weights | {down: weights[down][:3]}, r"shape \(3, 64, 96\), expected \(4, 64, 96\)"),
        (weights | {down: weights[down].astype(np.int32)}, "dtype int32"),
        (weights | {down: weights[down].tolist()}, "must be a NumPy array"),
        (weights | {down: OnDevice()}, "move it to the CPU"),
        ({}, "there are no weights"),
        ([], "must be a mapping"),
        (None, "must be a mapping"),
        (tmp_path / "none.safetensors", "none.safetensors"),
    ):
        with pytest.raises(WeightsError, match=message) as caught:
            module.bind(given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"no weight name starts with 'model\.'"):
        module.bind(weights, prefix="model")


def _safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def test_a_safetensors_file_with_a_prefix(
    module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "model.safetensors"
    names = {"router.weight": "gate.weight"} | {n: n for n in weights if n != "router.weight"}
    ours = {f"model.layers.3.block_sparse_moe.{names[n]}": w for n, w in weights.items()}
    others = {f"model.layers.30.block_sparse_moe.{names[n]}": -w for n, w in weights.items()}
    _safetensors(file, ours | others | {"model.embed.weight": np.zeros((3, 3), np.float32)})
    for given in (file, str(file), tmp_path):
        bound = module.bind(given, prefix="model.layers.3.block_sparse_moe.")
        np.testing.assert_array_equal(bound(x), module.bind(weights)(x))
    with pytest.raises(WeightsError):
        module.bind(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError):
        module.bind(file, prefix="model.layers.3.block_sparse_moe.")


# ---------------------------------------------------------------- lifetimes


def test_many_layers_of_one_module(module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    layers = [module.bind({n: w * np.float32(1 + i) for n, w in weights.items()}) for i in range(12)]
    assert len({id(one.module) for one in layers}) == 1
    together = [one(x) for one in layers]
    for i, y in enumerate(together):
        np.testing.assert_array_equal(module.bind({n: w * np.float32(1 + i) for n, w in weights.items()})(x), y)


def _threads_of_this_process() -> int:
    return sum(1 for _ in pathlib.Path("/proc/self/task").iterdir())


def test_pools_go_with_their_module(built: Any, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    gc.collect()  # pools of earlier tests
    before = _threads_of_this_process()
    module = moegen.load(built(verify=False, **SMALL).path, threads=4)
    layers = [module.bind(weights) for _ in range(3)]
    y = layers[0](x)
    assert _threads_of_this_process() == before + 3, "one pool for all layers of a module"
    gone = weakref.ref(module)
    del module
    np.testing.assert_array_equal(layers[1](x), y)
    del layers
    gc.collect()
    assert gone() is None
    assert _threads_of_this_process() == before
    assert np.isfinite(y).all()


def test_a_result_outlives_its_layer(module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray) -> None:
    bound = module.bind(weights)
    y, routing = bound(x, return_routing=True)
    copy = y.copy(), routing.ids.copy()
    for _ in range(3):
        bound(np.random.default_rng(0).standard_normal(x.shape).astype(np.float32))
    del bound
    gc.collect()
    np.testing.assert_array_equal(y, copy[0])
    np.testing.assert_array_equal(routing.ids, copy[1])


# ---------------------------------------------------------------- other processes

PRELUDE = """
import gc, os, signal, sys, threading, time
import numpy as np
import moegen
from moegen import reference
module = moegen.load(sys.argv[1], threads=2)
layer = module.bind(reference.random_weights(module.config, np.random.default_rng(0)))
x = np.random.default_rng(1).standard_normal((300, module.config.hidden)).astype(np.float32)
expected = layer(x)
"""

FORK = """
def check():
    for _ in range(5):
        assert np.array_equal(layer(x), expected)

def wait_for(pid):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"
"""


def _succeeds(code: str, *arguments: object, **options: Any) -> str:
    done = run_python(code, *arguments, **options)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    assert not done.stderr.strip(), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "child",
    [
        "check()",
        "pass",
        "del layer, module; gc.collect()",
        "check(); del layer, module; gc.collect()",
        "layer = module.bind(reference.random_weights(module.config, np.random.default_rng(0)), threads=3); check()",
    ],
)
@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)"])
def test_fork(child: str, leave: str, module: moegen.Module) -> None:
    """After a call with two threads, a forked child computes too, and both sides end."""
    code = f"""
time.sleep(0.05)  # the workers sleep by now
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            {child}
        except BaseException:
            os._exit(3)
        {leave}
    assert wait_for(pid) == 0
    check()
"""
    _succeeds(PRELUDE + FORK + code, module.artifact.path)


def test_fork_during_a_call(module: moegen.Module) -> None:
    """Forked while another thread is inside a call: the child's own calls still work."""
    code = """
stop = False
def run():
    big = np.tile(x, (20, 1))
    while not stop:
        layer(big)
worker = threading.Thread(target=run)
worker.start()
for _ in range(10):
    time.sleep(0.003)
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            os._exit(3)
        os._exit(0)
    assert wait_for(pid) == 0
stop = True
worker.join()
check()
"""
    _succeeds(PRELUDE + FORK + code, module.artifact.path)


def test_multiprocessing_with_fork(module: moegen.Module) -> None:
    code = """
import multiprocessing
def work(i):
    return np.array_equal(layer(x), expected)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map_async(work, range(8)).get(timeout=30))
assert work(0)
"""
    _succeeds(PRELUDE + code, module.artifact.path)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del layer; gc.collect(); del module; gc.collect()",
        "del module; gc.collect(); del layer",
        "keep = [layer]; keep.append(keep); del layer, module",
        "sys.modules['kept'] = layer",
        "t = threading.Thread(target=lambda: [layer(x) for _ in range(200)]); t.start()",
        "sys.exit(0)",
        "layers = [moegen.load(sys.argv[1], threads=3).bind(reference.random_weights(module.config, np.random.default_rng(0)))"
        " for _ in range(5)]; [one(x) for one in layers]",
    ],
)
def test_the_process_ends_cleanly(ending: str, module: moegen.Module) -> None:
    _succeeds(PRELUDE + ending, module.artifact.path)


@pytest.mark.parametrize("size", [1, 300, 6000])
def test_the_process_ends_while_daemon_threads_call(size: int, module: moegen.Module) -> None:
    code = f"""
big = np.resize(x, ({size}, x.shape[1])).copy()
def run():
    while True:
        layer(big)
for _ in range(3):
    threading.Thread(target=run, daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(3):
        _succeeds(PRELUDE + code, module.artifact.path)


def test_import_and_run_need_no_compiler(module: moegen.Module) -> None:
    """The whole path of a user of an artifact, with everything else forbidden."""
    code = """
import sys
forbidden = ("tvm", "jinja2", "xgboost", "click", "torch", "tqdm", "moegen.builder", "moegen.compiler",
             "moegen.emission", "moegen.schedules", "moegen.verification", "moegen.reference", "moegen.cli")
import moegen
assert not set(forbidden) & set(sys.modules), set(forbidden) & set(sys.modules)
import numpy as np
import tvm_ffi  # imports torch and ml_dtypes itself, where they are installed
forbidden = set(forbidden) - set(sys.modules)
module = moegen.load(sys.argv[1])
from_store = moegen.load(store=sys.argv[2], experts=4, top_k=2, hidden=64, intermediate=96, dtype="float32", capacity_factor=None,
                         activation="swiglu")
shapes = {"router.weight": (4, 64), "experts.gate.weight": (4, 96, 64), "experts.up.weight": (4, 96, 64),
          "experts.down.weight": (4, 64, 96)}
rng = np.random.default_rng(0)
layer = module.bind({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
y, routing = layer(rng.standard_normal((3, 64)).astype(np.float32), return_routing=True)
assert np.isfinite(y).all()
loaded = {name for name in forbidden if name in sys.modules}
assert not loaded, loaded
print("fine")
"""
    path = module.artifact.path
    assert _succeeds(code, path, path.parent).strip() == "fine"


def test_import_alone_is_light() -> None:
    """`import moegen` loads neither NumPy nor tvm_ffi: those come with the first name that needs them."""
    heavy = "import sys, moegen; print(sorted({'numpy', 'tvm_ffi', 'tvm', 'jinja2', 'click'} & set(sys.modules)))"
    assert _succeeds(heavy).strip() == "[]"


# ---------------------------------------------------------------- the raw exported functions

RAW = """
import itertools, sys
import numpy as np
import moegen
from moegen.arrays import empty_aligned
module = moegen.load(sys.argv[1], threads=2)
f, c = module.functions, module.config
T, K, E, H = 5, c.top_k, c.experts, c.hidden
pool = f["pool"](2)

def make(*shape, dtype=np.float32):
    array = empty_aligned(shape, dtype)
    array[...] = 0
    return array

x, out = make(T, H), make(T, H)
blob = make(module.artifact.manifest["packed_bytes"], dtype=np.uint8)
ids, weights, load, stats = make(T, K, dtype=np.int32), make(T, K), make(E, dtype=np.int32), make(4, dtype=np.float64)
space = make(f["workspace_bytes"](T), dtype=np.uint8)
right = {
    "forward": [x, x.copy(), out, blob, space, pool, ids, weights, load, stats],
    "route": [x, blob, space, pool, ids, weights, load, stats],
    "experts": [x, ids, weights, out, blob, space, pool],
    "workspace_bytes": [3],
    "pool": [2],
}
right["forward"][1] = make(T, H)
for name, arguments in right.items():
    assert f[name](*arguments) is not None, name

def bad_versions(value):
    yield "text"
    yield 1.5
    yield [1, 2]
    if not isinstance(value, np.ndarray):
        yield np.zeros(3, np.float32)
        return
    yield 7
    yield make(*value.shape, 1, dtype=value.dtype)                       # one more dimension
    yield make(*(n + 1 for n in value.shape), dtype=value.dtype)[1:] if value.ndim > 1 else make(1, value.size, dtype=value.dtype)
    yield make(*value.shape[:-1], value.shape[-1] - 1, dtype=value.dtype)  # too narrow
    yield make(0, dtype=value.dtype)
    yield make(1, dtype=value.dtype).reshape(())
    yield make(*value.shape, dtype=np.int16 if value.itemsize != 2 else np.float64)
    odd = make(value.nbytes + 64, dtype=np.uint8)
    if value is not load and value is not stats:
        yield odd[value.itemsize:][:value.nbytes].view(value.dtype).reshape(value.shape)  # misaligned
    else:
        yield odd[1:][:value.nbytes].view(value.dtype).reshape(value.shape)
    if value.ndim > 1:
        yield np.asfortranarray(value)
        yield np.concatenate([value, value], axis=1)[:, ::2]

optional = {"forward": {1, 6, 7, 8, 9}}
refused = 0
for name, arguments in right.items():
    versions = [arguments[:-1], arguments + [1], [], [None] * len(arguments)]
    for i, value in enumerate(arguments):
        if i not in optional.get(name, ()):
            versions.append(arguments[:i] + [None] + arguments[i + 1:])
        versions += [arguments[:i] + [bad] + arguments[i + 1:] for bad in bad_versions(value)]
    for wrong in versions:
        try:
            f[name](*wrong)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            assert str(error).strip(), (name, wrong)
            refused += 1
        else:
            raise AssertionError((name, [(w.shape, w.dtype, w.strides) if isinstance(w, np.ndarray) else type(w) for w in wrong]))

more = {
    "workspace_bytes": [[-1], [2**31], [2**62], [True], [float("inf")]],
    "pool": [[0], [-1], [1025], [2**40]],
    "experts": [[x, np.full_like(ids, bad), weights, out, blob, space, pool] for bad in (-1, E, 2**31 - 1, -2**31)],
    "pack": [
        [blob, 0, 0, None, None, pool], [blob, 99, 0, make(E, H), None, pool], [blob, -1, 0, make(E, H), None, pool],
        [blob, 0, 1, make(E, H), None, pool], [blob, 0, -1, make(E, H), None, pool], [blob, 0, 0, make(E, H + 1), None, pool],
        [blob, 0, 0, make(E * H), None, pool], [blob[64:], 0, 0, make(E, H), None, pool], [None, 0, 0, make(E, H), None, pool],
        [blob, 1, 0, make(c.intermediate, H), None, pool], [blob, 1, 0, None, make(c.intermediate, H), pool],
        [blob, 1, 0, make(c.intermediate, H), make(c.intermediate, H - 1), pool],
        [blob, 0, 0, make(E, H, dtype=np.int16), None, pool],
        [blob, 1, 0, make(c.intermediate, H).reshape(c.intermediate, H, 1), make(c.intermediate, H), pool], [],
    ],
    "pool_free": [[], ["pool"], [1.5], [None], [pool, pool]],
}
for name, versions in more.items():
    for wrong in versions:
        if name == "workspace_bytes" and wrong == [True]:
            continue
        try:
            f[name](*wrong)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            refused += 1
        else:
            raise AssertionError((name, wrong))
for name, arguments in right.items():
    f[name](*arguments)
f["pool_free"](pool)
print(refused)
"""


def test_raw_calls_with_wrong_arguments(module: moegen.Module, half_module: moegen.Module) -> None:
    """Every argument of every exported function, wrong in a dozen ways: an error each time, never a crash."""
    narrow = RAW.replace("make(T, H)", "make(T, H, dtype=np.uint16)").split("more = {")[0] + "print(refused)"
    for one, code in ((module, RAW), (half_module, narrow)):
        assert int(_succeeds(code, one.artifact.path).strip()) > 100


# ---------------------------------------------------------------- torch, and the same memory


def _watch(layer: moegen.Layer, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes the addresses of input and output of each call."""
    real = layer._functions["forward"]

    def forward(*given: Any) -> None:
        seen.extend((given[0].ctypes.data, given[2].ctypes.data))
        real(*given)

    monkeypatch.setitem(layer._functions, "forward", forward)


def test_torch_tensors(
    layer: moegen.Layer, half: moegen.Layer, module: moegen.Module, weights: dict[str, np.ndarray], x: np.ndarray
) -> None:
    torch = pytest.importorskip("torch")
    y = layer(torch.from_numpy(x))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), layer(x))
    out, routing = layer(torch.from_numpy(x[:16]).reshape(2, 8, H).requires_grad_(), return_routing=True)
    assert out.shape == (2, 8, H)
    assert routing.ids.dtype == torch.int32
    assert routing.weights.dtype == torch.float32
    np.testing.assert_array_equal(layer.experts(torch.from_numpy(x[:16]), routing.ids, routing.weights).numpy(), layer(x[:16]))
    np.testing.assert_array_equal(layer(torch.from_numpy(x).to(torch.bfloat16)).numpy(), layer(x.astype(ml_dtypes.bfloat16)))
    np.testing.assert_array_equal(layer(torch.from_numpy(x).t().contiguous().t()).numpy(), layer(x))
    torch_weights = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}
    np.testing.assert_array_equal(module.bind(torch_weights)(x), layer(x))
    with pytest.raises(InputError, match="dtype float64"):
        layer(torch.from_numpy(x).double())
    with pytest.raises(InputError, match="meta"):
        layer(torch.empty(3, H, device="meta"))
    y16 = half(torch.from_numpy(x).to(torch.bfloat16))
    assert y16.dtype == torch.bfloat16
    np.testing.assert_array_equal(y16.view(torch.int16).numpy(), half(x.astype(ml_dtypes.bfloat16)).view(np.int16))


def test_torch_without_copies(layer: moegen.Layer, half: moegen.Layer, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned tensors go in and come out as the same memory."""
    torch = pytest.importorskip("torch")
    for one, dtype, bits_dtype in ((layer, torch.float32, np.float32), (half, torch.bfloat16, np.int16)):
        given = torch.from_numpy(empty_aligned(x.shape, bits_dtype)).view(dtype)
        given.copy_(torch.from_numpy(x))
        out = torch.from_numpy(empty_aligned(x.shape, bits_dtype)).view(dtype)
        seen: list[int] = []
        _watch(one, seen, monkeypatch)
        one.forward_into(given, out)
        assert seen == [given.data_ptr(), out.data_ptr()]
        y = one(given)
        assert seen[2] == given.data_ptr()
        assert seen[3] == y.data_ptr()


def test_numpy_without_copies(layer: moegen.Layer, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    _watch(layer, seen, monkeypatch)
    given, out = empty_aligned(x.shape, np.float32), empty_aligned(x.shape, np.float32)
    layer.forward_into(given, out)
    assert seen == [given.ctypes.data, out.ctypes.data]
    given.flags.writeable = False
    y = layer(given.reshape(1, *x.shape))
    assert seen[2:] == [given.ctypes.data, y.ctypes.data]


def test_another_module_beside_it(built: Any, layer: moegen.Layer, x: np.ndarray) -> None:
    """Two libraries in one process keep their stages apart."""
    expected = layer(x)
    other = moegen.load(built(verify=False, **TINY).path, threads=2)
    bound = other.bind(reference.random_weights(other.config, np.random.default_rng(0)))
    small = x[:, :16].copy()
    y = bound(small)
    np.testing.assert_array_equal(layer(x), expected)
    np.testing.assert_array_equal(bound(small), y)
