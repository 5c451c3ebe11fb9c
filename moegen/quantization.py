"""Matrices in few bits: codes and scales, how they are rounded, and what they mean.

A matrix [n, k] is applied as x @ w.T, and each run of `weight_group` terms along k shares a scale (all of k with weight_group=0):
G = ceil(k / group), the last group may be short. In every row i of it

* int8 and int4: value[i, j] = scale[i, g] * (code[i, j] - zero[i, g]), zero 0 without zero points. Codes and zeros are signed:
  an unsigned code u of b bits is u - 2**(b - 1) here, and so is its zero point;
* mxfp4: value[i, j] = E2M1[code[i, j]] * 2**(scale[i, g] - 127) (OCP Microscaling Formats v1.0, sections 5.2 and 5.3).

Everything rounds to nearest, ties to even, and is computed in float64 on float32 weights, where no quotient can come to lie on
the wrong side of a tie; only `quantize_rows` is float32 throughout, because kernels compute it as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import FLOATS, HostArray, as_host_array, to_float32, to_storage
from .config import MoEConfig
from .errors import ConfigError, WeightsError
from .storage import SCALE_DTYPES

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[Any]

CODE_RANGES = {"int8": (-128, 127), "int4": (-8, 7), "mxfp4": (0, 15)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)
E8M0_BIAS = 127
E8M0_NAN = 255

_BLOCK = 1 << 16  # values that are worked on at a time: temporaries stay in the cache, and memory stays near the result
_E2M1_MAX_EXPONENT = 2  # of 6 = 1.5 * 2**2


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """One matrix [n, k] in few bits; `check` says whether it is well formed for a configuration.

    Attributes:
        codes: [n, k], int8 for int8 (-128 to 127) and int4 (-8 to 7), uint8 for mxfp4 (0 to 15, the sign in bit 3).
        scales: [n, G], float32 values, or for mxfp4 uint8 exponents with a bias of 127.
        zeros: [n, G] int8 in the range of the codes, or None.
    """

    codes: Codes
    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.int8] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of these arrays, in which a 4-bit code takes a whole byte."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, picked: slice) -> Quantized:
        """Some of the rows, as views."""
        return Quantized(self.codes[picked], self.scales[picked], None if self.zeros is None else self.zeros[picked])


def group_of(config: MoEConfig, k: int) -> int:
    """Consecutive terms of a dot product over k that share a scale."""
    return config.weight_group or k


def groups_of(config: MoEConfig, k: int) -> int:
    """G, the number of scales in a row of k codes."""
    return -(-k // group_of(config, k))


def stored_bytes(config: MoEConfig, n: int, k: int) -> int:
    """Bytes of a matrix [n, k] as `config` stores it: codes, scales and zero points, without padding."""
    item_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}
    if not config.low_bit:
        return n * k * item_bytes[config.dtype]
    scale_bytes = 1 if config.weight_dtype == "mxfp4" else item_bytes[config.scale_dtype]
    per_group = n * groups_of(config, k) * (scale_bytes + int(config.weight_zero_point))
    return n * k // (1 if config.weight_dtype == "int8" else 2) + per_group


# ---------------------------------------------------------------- weights


def quantize(weight: HostArray | npt.NDArray[Any], config: MoEConfig, name: str = "weight") -> Quantized:
    """A matrix rounded to what `config` stores, each value to the nearest code of its group.

    Scales are max|w| / 127 or / 7; with zero points (max - min) / 255 or / 15 over a range that includes 0, and the zero point
    is -min / scale, rounded. A scale is rounded to `scale_dtype` before it divides, and is 1 where all weights are 0.
    mxfp4 takes the exponent floor(log2(max|w|)) - 2, and 6 for what is larger (OCP Microscaling v1.0, section 6.3).

    Args:
        weight: float [n, k], as an array or a `HostArray`; float64 is read as float32.
        config: which codes, groups, zero points and scales; `low_bit` must hold.
        name: what the messages call it.

    Raises:
        WeightsError: weight is no matrix of finite floats, or `scale_dtype` cannot hold a scale.
        ConfigError: weight_dtype is "same".
    """
    if not config.low_bit:
        raise ConfigError("weight_dtype='same' has no codes: choose int8, int4 or mxfp4")
    array = as_host_array(weight, name, WeightsError)
    if array.dtype not in FLOATS:
        raise WeightsError(f"{name} has dtype {array.dtype}, expected one of {', '.join(FLOATS)}")
    if len(array.shape) != 2 or 0 in array.shape:
        raise WeightsError(f"{name} has shape {array.shape}, expected (n, k)")
    n, k = array.shape
    group, count = group_of(config, k), groups_of(config, k)
    mxfp4 = config.weight_dtype == "mxfp4"
    codes = np.empty((n, k), np.uint8 if mxfp4 else np.int8)
    scales = np.empty((n, count), np.uint8 if mxfp4 else np.float32)
    zeros = np.empty((n, count), np.int8) if config.weight_zero_point else None
    for rows in _blocks(n, k):
        padded = np.zeros((rows.stop - rows.start, count * group), np.float64)  # zeros move neither a maximum nor a minimum
        padded[:, :k] = to_float32(HostArray(array.data[rows], array.dtype))
        grouped = padded.reshape(len(padded), count, group)
        if not np.isfinite(grouped).all():
            raise WeightsError(f"{name} has values that are not finite, which no {config.weight_dtype} code stands for")
        some, scales[rows], offsets = _to_mxfp4(grouped) if mxfp4 else _to_integers(grouped, config, name)
        codes[rows] = some.reshape(padded.shape)[:, :k]
        if zeros is not None and offsets is not None:
            zeros[rows] = offsets
    return Quantized(codes, scales, zeros)


def dequantize(quantized: Quantized, config: MoEConfig, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """The values that the codes stand for, [n, k].

    Exact in float64; in float32 exact too with scales of float16 or bfloat16 and for mxfp4, else rounded once.
    """
    n, k = quantized.shape
    group, count = group_of(config, k), groups_of(config, k)
    values = np.empty((n, k), dtype)
    for rows in _blocks(n, k):
        some = quantized.rows(rows)
        if config.weight_dtype == "mxfp4":
            meant, scales = E2M1[some.codes], np.ldexp(1.0, some.scales.astype(np.int32) - E8M0_BIAS)
        else:
            meant, scales = some.codes.astype(np.float64), some.scales.astype(np.float64)
            if some.zeros is not None:
                meant -= _spread(some.zeros, group, count, k)
        with np.errstate(over="ignore"):  # 127 times a scale near float32's largest
            values[rows] = meant * _spread(scales, group, count, k)
    return values


def _to_integers(grouped: Floats, config: MoEConfig, name: str) -> tuple[Codes, npt.NDArray[Any], Floats]:
    """Codes [rows, G, group], scales [rows, G] and zero points [rows, G] of float64 [rows, G, group]."""
    lowest, highest = CODE_RANGES[config.weight_dtype]
    low, high = np.minimum(grouped.min(axis=-1), 0.0), np.maximum(grouped.max(axis=-1), 0.0)
    exact = (high - low) / (highest - lowest) if config.weight_zero_point else np.maximum(high, -low) / highest
    scales = _stored(exact, config.scale_dtype)
    impossible = np.isinf(scales) | ((scales == 0) & (exact > 0))
    if impossible.any():
        raise WeightsError(_unstorable(float(exact[impossible][0]), config, name))
    scales[exact == 0] = 1.0
    divisor = scales.astype(np.float64)
    offset = np.zeros_like(divisor)
    if config.weight_zero_point:
        offset = np.clip(np.rint(-low / divisor) + lowest, lowest, highest)
    codes = np.rint(grouped / divisor[..., None])
    codes += offset[..., None]
    return np.clip(codes, lowest, highest, out=codes), scales, offset


def _unstorable(scale: float, config: MoEConfig, name: str) -> str:
    complaint = f"{name} needs a scale of {scale:g}, which scale_dtype={config.scale_dtype!r} cannot hold"
    if config.scale_dtype == "float32":  # only weights around 1e-43 get here
        return f"{complaint}: make its values larger, or zero"
    return f"{complaint}: set scale_dtype='float32'"


def _to_mxfp4(grouped: Floats) -> tuple[Codes, npt.NDArray[Any], None]:
    """Codes [rows, G, group] and exponents [rows, G] of float64 [rows, G, group]; there are no zero points."""
    largest = np.abs(grouped).max(axis=-1)
    exponent = np.frexp(largest)[1] - 1 - _E2M1_MAX_EXPONENT  # frexp's mantissas start at 1/2
    exponent = np.where(largest == 0, 0, np.maximum(exponent, -E8M0_BIAS))
    scaled = np.abs(np.ldexp(grouped, -exponent[..., None]))
    # Neighbours are 1/2 apart below 2, 1 below 4, and 2 above. The offsets are even, so that ties go to even codes.
    codes = np.where(scaled < 2, np.rint(2 * scaled), np.where(scaled < 4, np.rint(scaled) + 2, np.rint(scaled / 2) + 4))
    codes = np.minimum(codes, 7).astype(np.uint8) | (np.signbit(grouped).astype(np.uint8) << 3)
    return codes, (exponent + E8M0_BIAS).astype(np.uint8), None


def _stored(values: Floats | npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """`values` rounded to a storage type, as float32 of their own."""
    array = HostArray(values, str(values.dtype))
    return np.array(to_float32(HostArray(to_storage(array, dtype), dtype)), np.float32)


def _spread(per_group: npt.NDArray[Any], group: int, count: int, k: int) -> npt.NDArray[Any]:
    """[rows, G] or what broadcasts to [rows, k]: the value of each code's group."""
    return per_group if count == 1 else np.repeat(per_group, group, axis=1)[:, :k]


def _blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _BLOCK // k)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# ---------------------------------------------------------------- activations


def quantize_rows(x: npt.ArrayLike) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Rows rounded to int8, each with a scale of its own, in float32 as kernels do it.

    scale = max|x| / 127 and code = rint(x / scale), both in float32; where that scale is 0 it is taken to be 1. Codes lie
    between -127 and 127. A row with an infinity or NaN has codes 0 and a scale that is not finite, so that products are NaN.

    Args:
        x: [T, n], read as float32.

    Returns:
        int8 codes [T, n] and float32 scales [T, 1].
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(x, np.float32)
        scales = np.max(np.abs(values), axis=1, keepdims=True, initial=0.0) / np.float32(127)
        scales[scales == 0] = 1.0
        codes = np.clip(np.rint(values / scales), -127, 127)
    codes[~np.isfinite(scales[:, 0])] = 0
    return codes.astype(np.int8), scales


# ---------------------------------------------------------------- checks


def check(quantized: Quantized, config: MoEConfig, n: int, k: int, name: str) -> None:
    """Refuse a matrix that is not [n, k] in the form that `config` says, or whose scales are not exact in `scale_dtype`.

    Raises:
        WeightsError: names the array, or the field of the configuration, and both values.
    """
    kind, count = config.weight_dtype, groups_of(config, k)
    _check_array(f"{name}: codes", quantized.codes, (n, k), np.dtype(np.uint8 if kind == "mxfp4" else np.int8), kind)
    _check_range(f"{name}: codes", quantized.codes, kind)
    scale_type = np.dtype(np.uint8 if kind == "mxfp4" else np.float32)
    _check_array(f"{name}: scales", quantized.scales, (n, count), scale_type, _grouping(config, k))
    if kind == "mxfp4":
        if (quantized.scales == E8M0_NAN).any():
            raise WeightsError(f"{name}: a scale is {E8M0_NAN}, which is NaN")
    else:
        _check_scales(quantized.scales, config, name)
    has_zeros = quantized.zeros is not None
    if has_zeros != config.weight_zero_point:
        raise WeightsError(
            f"{name} has {'' if has_zeros else 'no '}zero points, but weight_zero_point is {config.weight_zero_point}: "
            f"set weight_zero_point={has_zeros}"
        )
    if quantized.zeros is not None:
        _check_array(f"{name}: zeros", quantized.zeros, (n, count), np.dtype(np.int8), _grouping(config, k))
        _check_range(f"{name}: zeros", quantized.zeros, kind)


def _check_array(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], why: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise WeightsError(f"{name} must be an array of {dtype}, not {getattr(array, 'dtype', type(array).__name__)}")
    if array.shape != shape:
        raise WeightsError(f"{name} has shape {array.shape}, expected {shape} ({why})")


def _check_range(name: str, codes: Codes, kind: str) -> None:
    lowest, highest = CODE_RANGES[kind]
    low, high = int(codes.min()), int(codes.max())
    if low < lowest or high > highest:
        raise WeightsError(f"{name} of {kind} must be between {lowest} and {highest}, got {low} to {high}")


def _check_scales(scales: npt.NDArray[np.float32], config: MoEConfig, name: str) -> None:
    if not np.isfinite(scales).all():
        raise WeightsError(f"{name}: a scale is not finite")
    fitting = [dtype for dtype in SCALE_DTYPES if np.array_equal(_stored(scales, dtype), scales)]
    if config.scale_dtype not in fitting:
        raise WeightsError(
            f"{name}: its scales are not exact in scale_dtype={config.scale_dtype!r}: set scale_dtype={fitting[0]!r}"
        )


def _grouping(config: MoEConfig, k: int) -> str:
    return f"weight_group={config.weight_group}: a scale for each {group_of(config, k)} of {k} codes"
