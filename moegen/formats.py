"""The low-bit formats of checkpoints, from the arrays of one matrix [n, k] to its codes and scales.

b is the bits of a code, G the groups of k.

* GPTQ: qweight int32 [k*b/32, n] and qzeros int32 [G, n*b/32], codes from the lowest bits up along their packed axis; scales
  [G, n]; g_idx int32 [k], the group of each input, which must be in order. Zero points are stored minus one by format "gptq",
  and as they are by "gptq_v2" (AutoGPTQ's and GPTQModel's checkpoint_format).
* AWQ ("gemm"): qweight int32 [k, n/8] and qzeros int32 [G, n/8], where the 8 codes of a word belong to columns 0, 2, 4, 6, 1, 3,
  5, 7 of its 8; scales [G, n]; 4 bits. It shares GPTQ's names and is told from it by the shape of qweight: k/8 and k rows.
* compressed-tensors "pack-quantized": weight_packed int32 [n, ceil(k*b/32)], weight_scale [n, G], weight_zero_point int32
  [ceil(n*b/32), G] packed along n, weight_shape [2] = (n, k). Zero points that are missing are 0.
* compressed-tensors "int-quantized": weight int8 [n, k], weight_scale [n, G], weight_zero_point int8 [n, G].
* MXFP4 of gpt-oss: blocks uint8 [n, G, 16], the lower half of a byte first; scales uint8 [n, G].

Integer codes are kept unsigned by the packed formats, code 2**(b-1) being the signed 0 of `moegen.quantization`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import HostArray, to_float32
from .config import MoEConfig
from .errors import WeightsError
from .quantization import Quantized, group_of, groups_of
from .storage import WEIGHT_GROUPS

Bytes = npt.NDArray[np.uint8]
Reader = Callable[[slice], Quantized]

GPTQ_FORMATS = ("gptq", "gptq_v2")

_BITS = {"int8": 8, "int4": 4}
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # in the word, of its columns 0 to 7: the inverse of 0, 2, 4, 6, 1, 3, 5, 7
_WORD = ("int32", "uint32")
_SCALES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The arrays of one matrix, by what they are to it: "qweight", "weight_packed", ..., "weight" for a plain array.

    `reader` recognises the format by these names and shapes; the method of a format checks its arrays, but does not read them,
    and returns a function from the rows that are wanted to their codes.
    """

    arrays: Mapping[str, HostArray]
    config: MoEConfig
    n: int
    k: int
    name: str
    checkpoint_format: str | None

    def reader(self) -> Reader:
        """Check the arrays as the format that they are of.

        Raises:
            WeightsError: an array is missing, superfluous, or of the wrong type or shape.
        """
        if "blocks" in self.arrays:
            return self.mxfp4()
        if "qweight" in self.arrays:
            return self.awq() if self.is_awq() else self.gptq()
        return self.pack_quantized() if "weight_packed" in self.arrays else self.int_quantized()

    @property
    def bits(self) -> int:
        return _BITS[self.config.weight_dtype]

    @property
    def groups(self) -> int:
        return groups_of(self.config, self.k)

    # -------- MXFP4

    def mxfp4(self) -> Reader:
        self._names("MXFP4", ("blocks", "scales"))
        if self.config.weight_dtype != "mxfp4":
            raise self._wrong("weight_dtype", self.config.weight_dtype, "mxfp4")
        self._shape("blocks", ("uint8",), (self.n, self.groups, 16))
        self._shape("scales", ("uint8",), (self.n, self.groups))
        return self._read_mxfp4

    def _read_mxfp4(self, picked: slice) -> Quantized:
        blocks = self.arrays["blocks"].data[picked]
        codes = _nibbles(blocks.reshape(len(blocks), -1))
        return Quantized(np.ascontiguousarray(codes[:, : self.k]), np.array(self.arrays["scales"].data[picked]))

    # -------- GPTQ and AWQ

    def is_awq(self) -> bool:
        """By the rows of qweight, which are packed for GPTQ only."""
        self._integers()
        shape = self.arrays["qweight"].shape
        known = {(self.k, self.n // 8): 4, (self.k * 4 // 32, self.n): 4, (self.k * 8 // 32, self.n): 8}
        if shape not in known:
            raise WeightsError(
                f"{self.name}: qweight has shape {shape}, expected {(self.k * self.bits // 32, self.n)} (GPTQ) "
                f"or {(self.k, self.n // 8)} (AWQ) for {self.n} outputs and {self.k} inputs"
            )
        if known[shape] != self.bits:
            raise self._wrong("weight_dtype", self.config.weight_dtype, f"int{known[shape]}")
        return bool(shape == (self.k, self.n // 8))

    def gptq(self) -> Reader:
        self._names("GPTQ", ("qweight", "qzeros", "scales"), ("g_idx",))
        self._divisible("GPTQ", 32 // self.bits, self.n, self.k)
        self._shape("qweight", _WORD, (self.k * self.bits // 32, self.n))
        self._scales("scales", lambda groups: (groups, self.n))
        self._shape("qzeros", _WORD, (self.groups, self.n * self.bits // 32))
        self._in_order("g_idx")
        return self._read_gptq

    def _read_gptq(self, picked: slice) -> Quantized:
        words = self.arrays["qweight"].data[:, picked]
        codes = _signed(_unpacked(words.T, self.bits), self.bits)
        return Quantized(codes, self._transposed_scales(picked), self._gptq_zeros(picked))

    def _gptq_zeros(self, picked: slice) -> npt.NDArray[np.int8] | None:
        stored = _unpacked(self.arrays["qzeros"].data, self.bits)[:, picked].T
        half, top = 1 << (self.bits - 1), (1 << self.bits) - 1
        if not self.config.weight_zero_point:
            symmetric = {"gptq": (half - 1,), "gptq_v2": (half,), None: (half - 1, half)}[self.checkpoint_format]
            if not any((stored == value).all() for value in symmetric):
                raise self._asymmetric()
            return None
        if self.checkpoint_format == "gptq_v2":
            return _signed(stored, self.bits)
        if (stored == top).any():
            # Readers disagree whether one more is 2**b or 0; the writer has overflowed.
            raise WeightsError(
                f"{self.name}: a zero point is stored as {top}, which is beyond {top} in format 'gptq', where one is added: "
                "save the checkpoint as 'gptq_v2', or pass checkpoint_format='gptq_v2' if it is one"
            )
        return _signed(stored + np.uint8(1), self.bits)

    def awq(self) -> Reader:
        self._names("AWQ", ("qweight", "qzeros", "scales"))
        self._divisible("AWQ", 8, self.n)
        self._shape("qweight", _WORD, (self.k, self.n // 8))
        self._scales("scales", lambda groups: (groups, self.n))
        self._shape("qzeros", _WORD, (self.groups, self.n // 8))
        return self._read_awq

    def _read_awq(self, picked: slice) -> Quantized:
        codes = _signed(_awq_columns(self.arrays["qweight"].data, picked).T, 4)
        zeros = _signed(_awq_columns(self.arrays["qzeros"].data, picked).T, 4)
        if not self.config.weight_zero_point and zeros.any():
            raise self._asymmetric()
        return Quantized(codes, self._transposed_scales(picked), zeros if self.config.weight_zero_point else None)

    def _transposed_scales(self, picked: slice) -> npt.NDArray[np.float32]:
        scales = self.arrays["scales"]
        return np.array(to_float32(HostArray(scales.data[:, picked], scales.dtype)).T, order="C")

    # -------- compressed-tensors

    def pack_quantized(self) -> Reader:
        self._names("compressed-tensors", ("weight_packed", "weight_scale"), ("weight_zero_point", "weight_shape", "weight_g_idx"))
        self._integers()
        words = {bits: (self.n, -(-self.k * bits // 32)) for bits in (self.bits, 4, 8)}
        shape = self.arrays["weight_packed"].shape
        other = next((bits for bits, expected in words.items() if shape == expected), self.bits)
        if other != self.bits:
            raise self._wrong("weight_dtype", self.config.weight_dtype, f"int{other}")
        self._shape("weight_packed", _WORD, words[self.bits])
        if "weight_shape" in self.arrays:
            self._shape("weight_shape", ("int64", "int32"), (2,))
            said = tuple(int(size) for size in self.arrays["weight_shape"].data)
            if said != (self.n, self.k):
                raise WeightsError(f"{self.name}: weight_shape says {said}, expected {(self.n, self.k)}")
        self._row_scales((-(-self.n * self.bits // 32), self.groups), _WORD)
        return self._read_pack_quantized

    def _read_pack_quantized(self, picked: slice) -> Quantized:
        codes = _signed(_unpacked(self.arrays["weight_packed"].data[picked], self.bits)[:, : self.k], self.bits)
        if "weight_zero_point" not in self.arrays:
            return Quantized(codes, self._picked_scales(picked), self._row_zeros(None, len(codes)))
        packed = _unpacked(self.arrays["weight_zero_point"].data.T, self.bits)[:, : self.n]
        zeros = _signed(packed[:, picked].T, self.bits)
        return Quantized(codes, self._picked_scales(picked), self._row_zeros(zeros, len(codes)))

    def int_quantized(self) -> Reader:
        self._names("compressed-tensors", ("weight", "weight_scale"), ("weight_zero_point", "weight_g_idx"))
        self._integers()
        self._shape("weight", ("int8",), (self.n, self.k))
        self._row_scales((self.n, self.groups), ("int8",))
        return self._read_int_quantized

    def _read_int_quantized(self, picked: slice) -> Quantized:
        codes = np.ascontiguousarray(self.arrays["weight"].data[picked])
        zeros = self.arrays["weight_zero_point"].data[picked] if "weight_zero_point" in self.arrays else None
        return Quantized(codes, self._picked_scales(picked), self._row_zeros(zeros, len(codes)))

    def _row_scales(self, zeros: tuple[int, int], zeros_dtype: tuple[str, ...]) -> None:
        """weight_scale, weight_zero_point and weight_g_idx, which both forms have in common."""
        self._scales("weight_scale", lambda groups: (self.n, groups))
        if "weight_zero_point" in self.arrays:
            self._shape("weight_zero_point", zeros_dtype, zeros)
        self._in_order("weight_g_idx")

    def _row_zeros(self, zeros: npt.NDArray[np.int8] | None, rows: int) -> npt.NDArray[np.int8] | None:
        """Zero points as the layer has them; compressed-tensors used to leave out those that are all 0, whatever the scheme."""
        if self.config.weight_zero_point:
            return np.zeros((rows, self.groups), np.int8) if zeros is None else zeros
        if zeros is not None and zeros.any():
            raise self._asymmetric()
        return None

    def _picked_scales(self, picked: slice) -> npt.NDArray[np.float32]:
        scales = self.arrays["weight_scale"]
        return np.array(to_float32(HostArray(scales.data[picked], scales.dtype)))

    # -------- checks

    def _names(self, title: str, needed: tuple[str, ...], possible: tuple[str, ...] = ()) -> None:
        for part in needed:
            if part not in self.arrays:
                raise WeightsError(f"{self.name}: {part} is missing, which {title} has beside {', '.join(self.arrays)}")
        for part in self.arrays:
            if part not in needed + possible:
                raise WeightsError(f"{self.name}: {part} does not belong to {title}, which has {', '.join(needed + possible)}")

    def _integers(self) -> None:
        if self.config.weight_dtype not in _BITS:
            raise WeightsError(
                f"{self.name} holds integers, but weight_dtype={self.config.weight_dtype!r}: set weight_dtype='int4' or 'int8'"
            )

    def _wrong(self, field: str, ours: Any, theirs: Any) -> WeightsError:
        return WeightsError(f"{self.name} has {field}={theirs!r}, but the layer has {field}={ours!r}: set {field}={theirs!r}")

    def _asymmetric(self) -> WeightsError:
        return WeightsError(
            f"{self.name} has zero points other than the symmetric one, but the layer has weight_zero_point=False: "
            "set weight_zero_point=True"
        )

    def _divisible(self, title: str, codes: int, *sizes: int) -> None:
        for size in sizes:
            if size % codes:
                raise WeightsError(f"{self.name}: {title} packs {codes} codes into a word, which does not divide {size}")

    def _shape(self, part: str, dtypes: tuple[str, ...], expected: tuple[int, ...]) -> None:
        array = self.arrays[part]
        if array.dtype not in dtypes:
            raise WeightsError(f"{self.name}: {part} has dtype {array.dtype}, expected {' or '.join(dtypes)}")
        if array.shape != expected:
            raise WeightsError(f"{self.name}: {part} has shape {array.shape}, expected {expected}")

    def _scales(self, part: str, shape: Callable[[int], tuple[int, int]]) -> None:
        """The shape of scales; one that another `weight_group` would have is said to be so."""
        found = self.arrays[part].shape
        for group in WEIGHT_GROUPS:
            if found == shape(-(-self.k // (group or self.k))) != shape(self.groups):
                raise WeightsError(
                    f"{self.name} has weight_group={group} ({part} of shape {found}), but the layer has "
                    f"weight_group={self.config.weight_group} (shape {shape(self.groups)}): set weight_group={group}"
                )
        self._shape(part, _SCALES, shape(self.groups))

    def _in_order(self, part: str) -> None:
        if part not in self.arrays:
            return
        self._shape(part, ("int32", "int64"), (self.k,))
        indices = self.arrays[part].data
        unset = part == "weight_g_idx" and bool((indices == -1).all())  # as compressed-tensors initialises it
        if not unset and not np.array_equal(indices, np.arange(self.k) // group_of(self.config, self.k)):
            raise WeightsError(
                f"{self.name}: {part} permutes the groups (act-order), which kernels with consecutive groups cannot honour: "
                "quantize without desc_act, or dequantize the weights first"
            )


# ---------------------------------------------------------------- bits


def _nibbles(packed: Bytes) -> Bytes:
    """[r, c] bytes to [r, 2c] codes, the lower half of a byte first."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes


def _unpacked(words: npt.NDArray[Any], bits: int) -> Bytes:
    """[r, c] words of 32 bits to [r, c * 32 / bits] unsigned codes, from the lowest bits up."""
    as_bytes = np.ascontiguousarray(words, "<i4" if words.dtype.kind == "i" else "<u4").view(np.uint8)
    return _nibbles(as_bytes) if bits == 4 else as_bytes


def _awq_columns(words: npt.NDArray[Any], picked: slice) -> Bytes:
    """[r, c] words to [r, 8c] unsigned codes in the order of their columns."""
    codes = _unpacked(words, 4)
    return codes.reshape(len(codes), -1, 8)[:, :, _AWQ_PLACES].reshape(codes.shape)[:, picked]


def _signed(codes: Bytes, bits: int) -> npt.NDArray[np.int8]:
    """u - 2**(bits - 1) as C-contiguous int8; bytes wrap to where the sign wants them."""
    wrapped: Bytes = np.subtract(codes, np.uint8(1 << (bits - 1)), order="C")
    return wrapped.view(np.int8)
