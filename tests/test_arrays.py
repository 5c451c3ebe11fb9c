"""Host arrays: every origin in and out, exact rounding, aligned memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen.arrays import HostArray, as_host_array, empty_aligned, is_aligned, like_input, to_float32, to_storage
from moegen.errors import InputError, WeightsError

BF16 = ml_dtypes.bfloat16


class Producer:
    """A DLPack array that is not NumPy's."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int32", "int64", "uint16", "bool"])
def test_numpy_is_viewed(dtype):
    array = np.ones((4, 6), dtype)[::2, ::3].T
    host = as_host_array(array, "x")
    assert host.dtype == dtype
    assert host.shape == array.shape
    assert host.data.strides == array.strides
    assert np.shares_memory(host.data, array)


def test_bfloat16_is_viewed_as_bits():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(BF16)
    host = as_host_array(array.T[::2], "x")
    assert (host.dtype, host.data.dtype, host.shape) == ("bfloat16", np.uint16, (2, 3))
    assert np.shares_memory(host.data, array)
    assert np.array_equal(to_float32(host), array.T[::2].astype(np.float32))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_scalars_and_empty_arrays(shape, dtype):
    array = np.zeros(shape, dtype)
    host = as_host_array(array, "x")
    assert host.shape == shape
    for target in ("float32", "bfloat16", "float16"):
        assert to_storage(host, target).shape == shape
    assert as_host_array(np.float32(2), "x").shape == ()


def test_read_only_and_big_endian():
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    assert np.shares_memory(as_host_array(array, "x").data, array)
    swapped = as_host_array(array.astype(">f4"), "x")
    assert swapped.dtype == "float32"
    assert swapped.data.dtype.isnative
    assert np.array_equal(swapped.data, array)


def test_host_array_is_itself():
    host = as_host_array(np.ones(2), "x")
    assert as_host_array(host, "x") is host


@pytest.mark.parametrize(
    "bad",
    [
        [1.0, 2.0],
        None,
        "x",
        3,
        {},
        object(),
        np.array([None]),
        np.ones(2, complex),
        np.array(["a"]),
        np.ones(2, np.longdouble),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.ma.masked_array([1.0], [True]),
        np.ndarray,
        Producer,
        Producer(np.ones(2), "nonsense"),
        Producer(np.ones(2, complex)),
        Producer(np.array([None])),
    ],
)
@pytest.mark.parametrize("error", [InputError, WeightsError])
def test_anything_else_is_refused_by_name(bad, error):
    with pytest.raises(error, match="the_argument"):
        as_host_array(bad, "the_argument", error)


def test_dlpack():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    host = as_host_array(Producer(array), "x")
    assert host.data.strides == array.strides
    assert np.shares_memory(host.data, array)
    with pytest.raises(InputError, match="cuda:1"):
        as_host_array(Producer(array, (2, 1)), "x")


def test_tvm_ffi_tensors():
    tvm_ffi = pytest.importorskip("tvm_ffi")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = tvm_ffi.from_dlpack(array)
    assert np.shares_memory(as_host_array(tensor, "x").data, array)
    back = like_input(array, "float32", tensor)
    assert isinstance(back, tvm_ffi.Tensor)
    assert np.shares_memory(np.from_dlpack(back), array)


class Bfloat16Producer(Producer):
    """Exports uint16 bits as bfloat16, by rewriting the type code in NumPy's DLPack capsule."""

    def __dlpack__(self, **kwargs):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        type_code_at = 20  # in DLTensor: after the data pointer, the device (2 * int32) and ndim (int32)
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + type_code_at).value = 4  # kDLBfloat
        return capsule


def test_bfloat16_over_dlpack():
    pytest.importorskip("tvm_ffi")
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    host = as_host_array(Bfloat16Producer(bits.T), "x")
    assert host.dtype == "bfloat16"
    assert np.shares_memory(host.data, bits)
    assert np.array_equal(host.data, bits.T)
    del bits
    assert host.data[2, 1] == 5
    assert as_host_array(Bfloat16Producer(np.zeros((0, 3), np.uint16)), "x").shape == (0, 3)


# ---------------------------------------------------------------- between types


def test_same_type_is_not_copied():
    for array in (np.ones((2, 3), np.float32).T, np.ones(3, np.float16), np.ones(3, BF16)):
        host = as_host_array(array, "x")
        assert to_storage(host, host.dtype) is host.data
    single = as_host_array(np.ones(3, np.float32), "x")
    assert np.shares_memory(to_float32(single), single.data)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_bfloat16_rounds_like_ml_dtypes(values):
    array = np.array(values, np.float32)
    bits = to_storage(as_host_array(array, "x"), "bfloat16").view(BF16)
    expected = array.astype(BF16)
    assert np.array_equal(bits.astype(np.float32), expected.astype(np.float32), equal_nan=True)
    assert np.array_equal(np.signbit(bits), np.signbit(expected)) or np.isnan(array).any()


def test_every_bfloat16_survives():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(HostArray(bits, "bfloat16"))
    back = to_storage(HostArray(values, "float32"), "bfloat16")
    nan = np.isnan(values)
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(to_float32(HostArray(back[nan], "bfloat16"))).all()
    signalling = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(HostArray(to_storage(HostArray(signalling, "float32"), "bfloat16"), "bfloat16"))).all()


def test_float64_rounds_once():
    # Just above halfway between two bfloat16 neighbours, by less than float32 can tell.
    tie = 1.0 + 2.0**-8
    values = np.array([tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40, 1e39, -1e39, 3.4e38, 1e-300, np.inf, np.nan, -0.0])
    got = to_float32(HostArray(to_storage(as_host_array(values, "x"), "bfloat16"), "bfloat16"))
    up, infinity = 1.0 + 2.0**-7, np.inf
    expected = np.array([up, 1.0, 1.0, -up, infinity, -infinity, infinity, 0.0, infinity, np.nan, -0.0], np.float32)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.signbit(got[-1])


@pytest.mark.filterwarnings("error")
def test_float16_and_overflow():
    values = np.array([1e5, -1e5, 65504.0, np.nan, 1e300])
    half = to_storage(as_host_array(values, "x"), "float16")
    assert half.dtype == np.float16
    assert np.array_equal(half, np.array([np.inf, -np.inf, 65504, np.nan, np.inf], np.float16), equal_nan=True)
    assert np.array_equal(to_storage(as_host_array(values[:2].astype(BF16), "x"), "float16"), half[:2])
    assert to_storage(as_host_array(values, "x"), "float32")[4] == np.inf


def test_strided_conversion():
    values = np.arange(24, dtype=np.float64).reshape(4, 6)[::2, ::-1].T
    for dtype in ("float32", "float16", "bfloat16"):
        stored = HostArray(to_storage(as_host_array(values, "x"), dtype), dtype)
        assert np.array_equal(to_float32(stored), values)


def test_integers_are_not_converted():
    host = as_host_array(np.ones(3, np.int32), "x")
    with pytest.raises(InputError, match="int32"):
        to_storage(host, "float32")
    with pytest.raises(InputError, match="int32"):
        to_float32(host)
    with pytest.raises(InputError, match="float8"):
        to_storage(as_host_array(np.ones(3), "x"), "float8")


# ---------------------------------------------------------------- out


def test_like_input_numpy():
    bits = np.zeros((2, 3), np.uint16)
    typed = like_input(bits, "bfloat16", np.zeros(1, BF16))
    assert typed.dtype == np.dtype(BF16)
    assert np.shares_memory(typed, bits)
    assert like_input(bits, "bfloat16", np.zeros(1, np.float32)) is bits
    result = np.zeros(3, np.float32)
    assert like_input(result, "float32", np.zeros(1)) is result


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", [0, 7, (3, 5), (), (0, 4), (1500, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", np.int32])
def test_empty_aligned(shape, dtype):
    array = empty_aligned(shape, dtype)
    assert array.shape == ((shape,) if isinstance(shape, int) else shape)
    assert array.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert is_aligned(array)
    array[...] = 1
    assert (array == 1).all()


def test_large_alignment():
    for alignment in (1, 4096, 1 << 16):
        assert is_aligned(empty_aligned(10, "float32", alignment), alignment)
    assert is_aligned(empty_aligned(1 << 20, "float32"), 2 << 20)
    assert not is_aligned(empty_aligned(10, "float32")[1:])
    with pytest.raises(InputError, match="48"):
        empty_aligned(10, "float32", 48)


def test_import_is_light():
    code = "import numpy, sys; before = set(sys.modules); import moegen.arrays; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tvm_ffi", "tvm", "torch", "ml_dtypes", "jinja2", "xgboost"} & set(added)
