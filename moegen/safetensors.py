"""Reading .safetensors files by memory map, without the safetensors package.

A file is an 8-byte little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, and the raw data that
the offsets count from (https://github.com/huggingface/safetensors). Nothing but the header is read until a tensor is used.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import HostArray
from .errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_DTYPES = {
    "F64": ("<f8", "float64"),
    "F32": ("<f4", "float32"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
    "I64": ("<i8", "int64"),
    "I32": ("<i4", "int32"),
    "I16": ("<i2", "int16"),
    "I8": ("i1", "int8"),
    "U64": ("<u8", "uint64"),
    "U32": ("<u4", "uint32"),
    "U16": ("<u2", "uint16"),
    "U8": ("u1", "uint8"),
    "BOOL": ("?", "bool"),
}


class SafetensorsFile(Mapping[str, HostArray]):
    """The tensors of one file by name, as read-only views of its memory map.

    Raises:
        WeightsError: the file cannot be read or is malformed; on access, a tensor's dtype is not one of NumPy's or bfloat16.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, self._start = self._header(file.read(8), file, size)
                self._entries = self._checked(header, size - self._start)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise WeightsError(f"cannot read the weights {self.path!r}: {error.strerror or error}") from error
        except ValueError as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"cannot read the weights {self.path!r}: {error}") from error  # a NUL in the path

    def __getitem__(self, name: str) -> HostArray:
        dtype, shape, begin = self._entries[name]
        if dtype not in _DTYPES:
            raise WeightsError(
                f"{self.path}: tensor {name!r} has dtype {dtype!r}, which is not supported; supported: {', '.join(_DTYPES)}"
            )
        code, readable = _DTYPES[dtype]
        try:
            view: np.ndarray[Any, Any] = np.ndarray(shape, np.dtype(code), buffer=self._map, offset=self._start + begin)
        except (ValueError, OverflowError, TypeError) as error:  # more dimensions than NumPy has, or absurd sizes beside a zero
            raise WeightsError(f"{self.path}: tensor {name!r} has an impossible shape {shape}: {error}") from error
        return HostArray(view if view.dtype.isnative else view.astype(view.dtype.newbyteorder("=")), readable)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def release(self) -> None:
        """Takes what was read out of this process's memory; it stays in the kernel's cache, and is mapped again when it is used."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _bad(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} is not a valid safetensors file: {what}")

    def _header(self, prefix: bytes, file: Any, size: int) -> tuple[dict[str, Any], int]:
        """The parsed JSON header and the position where the data starts."""
        if len(prefix) < 8:
            raise self._bad(f"it has {size} bytes, less than the 8 of the header length")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise self._bad(f"its header length is {length}, above the limit of {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise self._bad(f"its header length is {length}, but only {size - 8} bytes follow")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not readable JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        return header, 8 + length

    def _checked(self, header: dict[str, Any], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """name -> (dtype, shape, begin), after checking that the tensors tile the data exactly."""
        header.pop("__metadata__", None)
        entries, spans = {}, []
        for name, entry in header.items():
            dtype, shape, begin, end = self._entry(name, entry)
            if not 0 <= begin <= end <= data_bytes:
                raise self._bad(f"tensor {name!r} has offsets [{begin}, {end}], but there are {data_bytes} bytes of data")
            if dtype in _DTYPES and end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype][0]).itemsize:
                raise self._bad(f"tensor {name!r} of dtype {dtype} and shape {list(shape)} cannot take {end - begin} bytes")
            entries[name] = (dtype, shape, begin)
            spans.append((begin, end, name))
        position, previous = 0, "the header"
        for begin, end, name in sorted(spans):
            if begin != position:
                raise self._bad(f"tensor {name!r} {'overlaps' if begin < position else 'leaves a gap after'} {previous!r}")
            position, previous = end, name
        if position != data_bytes:
            raise self._bad(f"{data_bytes - position} bytes after the last tensor belong to none")
        return entries

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self._bad(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise self._bad(f"tensor {name!r} has dtype {dtype!r}, not a string")
        if not _whole(shape):
            raise self._bad(f"tensor {name!r} has shape {shape!r}, not a list of whole numbers")
        if not _whole(offsets) or len(offsets) != 2:
            raise self._bad(f"tensor {name!r} has data_offsets {offsets!r}, not two whole numbers")
        return dtype, tuple(shape), offsets[0], offsets[1]


class Shards(Mapping[str, HostArray]):
    """The tensors of a sharded checkpoint; a shard is opened when one of its tensors is first used."""

    def __init__(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        self._folder = folder
        self._weight_map = weight_map
        self._open: dict[str, SafetensorsFile] = {}

    def __getitem__(self, name: str) -> HostArray:
        shard = self._weight_map[name]
        if shard not in self._open:
            self._open[shard] = SafetensorsFile(self._folder / shard)
        if name not in self._open[shard]:
            raise WeightsError(f"the index says that {name!r} is in {shard!r}, but it is not there")
        return self._open[shard][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weight_map)

    def __len__(self) -> int:
        return len(self._weight_map)

    def release(self) -> None:
        """As of each file that was opened."""
        for file in self._open.values():
            file.release()


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile | Shards:
    """The tensors behind a path: a .safetensors file, an index of shards, or the folder that holds either.

    Raises:
        WeightsError: there is no such file, or it is malformed.
    """
    location = Path(os.fsdecode(path))
    try:
        if location.is_dir():
            location = _in_folder(location)
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the weights {str(location)!r}: {error}") from error
    if location.suffix == ".json":
        return Shards(location.parent, _weight_map(location))
    if location.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz"):
        raise WeightsError(f"{location} is not a safetensors file; load it yourself and pass the mapping of names to arrays")
    return SafetensorsFile(location)


def _in_folder(folder: Path) -> Path:
    for name in (INDEX_NAME, "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(
            f"the folder {str(folder)!r} has neither {INDEX_NAME} nor model.safetensors, and {len(files)} other .safetensors files"
        )
    return files[0]


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"cannot read the weights index {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the weights index {str(path)!r} is not readable JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise WeightsError(f"the weights index {str(path)!r} has no 'weight_map'")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsError(f"the weights index {str(path)!r} puts {name!r} in {shard!r}, which is not a file name")
    return weight_map


def _whole(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects as dicts, refusing a name that comes twice (the last would silently win)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return result
