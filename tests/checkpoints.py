"""Checkpoints: as files, and in few bits, packed code by code with Python's integers; nothing is shared with what reads them."""

from __future__ import annotations

import json
import struct

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of 8 columns each nibble of a word belongs to, from the lowest up


def words(codes, bits):
    """Rows of unsigned codes to rows of int32 words, from the lowest bits up; the last word may be short."""
    per_word = 32 // bits
    packed = [
        [sum(code << (bits * i) for i, code in enumerate(row[start : start + per_word])) for start in range(0, len(row), per_word)]
        for row in codes
    ]
    return np.array(packed, np.uint32).view(np.int32)


def unsigned(codes, bits):
    return [[int(code) + 2 ** (bits - 1) for code in row] for row in codes]


def gptq(q, bits, group, version="gptq", scales=np.float16):
    """The arrays of `q` [n, k] as AutoGPTQ keeps them."""
    k = q.codes.shape[1]
    zeros = np.zeros(q.scales.shape, int) if q.zeros is None else q.zeros
    stored = [[zero - (version == "gptq") for zero in row] for row in unsigned(zeros.T, bits)]
    return {
        "qweight": words(unsigned(q.codes, bits), bits).T.copy(),
        "qzeros": words(stored, bits),
        "scales": q.scales.T.astype(scales),
        "g_idx": np.array([j // (group or k) for j in range(k)], np.int32),
    }


def awq(q):
    def packed(columns):
        return words([[row[i + j] for i in range(0, len(row), 8) for j in AWQ_ORDER] for row in unsigned(columns, 4)], 4)

    zeros = np.zeros(q.scales.shape, int) if q.zeros is None else q.zeros
    return {"qweight": packed(q.codes.T), "qzeros": packed(zeros.T), "scales": q.scales.T.astype(np.float16)}


def pack_quantized(q, bits, scales=np.float32):
    arrays = {
        "weight_packed": words(unsigned(q.codes, bits), bits),
        "weight_scale": q.scales.astype(scales),
        "weight_shape": np.array(q.codes.shape, np.int64),
    }
    return arrays if q.zeros is None else arrays | {"weight_zero_point": words(unsigned(q.zeros.T, bits), bits).T.copy()}


def int_quantized(q, scales=np.float32):
    arrays = {"weight": q.codes, "weight_scale": q.scales.astype(scales)}
    return arrays if q.zeros is None else arrays | {"weight_zero_point": q.zeros}


def mxfp4(q):
    n, k = q.codes.shape
    padded = [[int(code) for code in row] + [0] * (-k % 32) for row in q.codes]
    blocks = [[[row[g + 2 * i] | row[g + 2 * i + 1] << 4 for i in range(16)] for g in range(0, len(row), 32)] for row in padded]
    return {"blocks": np.array(blocks, np.uint8).reshape(n, -1, 16), "scales": q.scales}


CODES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}


def save(path, arrays):
    header, position, blobs = {}, 0, []
    for name, array in arrays.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = entry(position, position + len(blob), CODES[array.dtype.name], array.shape)
        position += len(blob)
        blobs.append(blob)
    path.write_bytes(raw(header) + b"".join(blobs))


def raw(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}
