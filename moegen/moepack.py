"""Packed weights in a file: what `moegen pack` writes, mapped into memory by `bind` and shared by all processes that map it.

`moegen.moepack_format` states how a file begins; its payload is the packed weights as they lie in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from .artifact import Artifact
from .config import MoEConfig
from .errors import WeightsError
from .moepack_format import MAGIC, PackedSegment, read
from .packing import layout_key
from .target import usable_processors

SUFFIX = ".moepack"


def is_moepack(path: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a path is that of packed weights: by its first bytes, or by its name where they are not to be had."""
    if not isinstance(path, str | os.PathLike):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC or _named_so(path)
    except (OSError, ValueError):
        return _named_so(path) and not os.path.isdir(path)


def _named_so(path: str | os.PathLike[str]) -> bool:
    return os.fsdecode(path).endswith(SUFFIX)


class _Unit(NamedTuple):
    """A run of bytes of the payload, what it is, and its checksum; None for what has to be zeros."""

    what: str
    begin: int
    end: int
    sha256: str | None


class MoePack:
    """A file of packed weights, mapped read-only; header and sizes are checked, the payload is not read.

    Raises:
        WeightsError: the file cannot be read, is not of this kind, truncated, damaged, or written by a newer moegen.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = os.fsdecode(path)
            with open(self.path, "rb") as file:
                self.header, self._front = read(file, os.fstat(file.fileno()).st_size, self.path)
                size = len(self._front) + self.header.packed_bytes
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise WeightsError(f"cannot read the packed weights {os.fsdecode(path)!r}: {error.strerror or error}") from error
        except (ValueError, OverflowError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"cannot read the packed weights {os.fsdecode(path)!r}: {error}") from error  # a NUL in the path

    @property
    def offset_bytes(self) -> int:
        """Where in the file the packed weights begin."""
        return len(self._front)

    @property
    def payload(self) -> npt.NDArray[np.uint8]:
        """The packed weights, a read-only view of the map."""
        return np.frombuffer(self._map, np.uint8, self.header.packed_bytes, self.offset_bytes)

    def check_fits(self, artifact: Artifact) -> None:
        """That the weights were packed for this layer and in its layout.

        Raises:
            WeightsError: they were not; the message says what differs.
        """
        header, config, manifest = self.header, artifact.config, artifact.manifest
        if header.layout == layout_key(manifest) and header.packed_bytes == manifest["packed_bytes"]:
            return
        fields = [f.name for f in dataclasses.fields(MoEConfig) if getattr(header.config, f.name) != getattr(config, f.name)]
        if header.target != artifact.target.kind:
            differs = f"for target {header.target}, this layer is for {artifact.target.kind}"
        elif fields:
            pairs = [f"{n}={getattr(header.config, n)!r} instead of {getattr(config, n)!r}" for n in fields[:4]]
            differs = f"for another layer: {', '.join(pairs)}"
        else:
            own = [PackedSegment(**s, sha256=()) for s in manifest["segments"]]
            differs = f"in another processor's layout, {_shapes(header.segments)} instead of {_shapes(own)}"
        raise WeightsError(
            f"{self.path} was packed {differs} (with {header.artifact['name']}): pack the checkpoint again with {artifact.name}"
        )

    def verify(self, progress: Callable[[int], object] = lambda done: None) -> None:
        """Reads all of the file and compares it with its checksums.

        Args:
            progress: called with the bytes that have been read since it was last called.

        Raises:
            WeightsError: a byte was changed; the message names the segment, the expert and where they lie in the file.
        """
        from concurrent.futures import ThreadPoolExecutor  # here, because loading should not pay for it

        units, workers = list(self._units()), ThreadPoolExecutor(min(usable_processors(), 16))
        try:
            for unit, sound in zip(units, workers.map(self._sound, units), strict=True):
                if not sound:
                    begin, end = unit.begin + self.offset_bytes, unit.end + self.offset_bytes
                    raise WeightsError(
                        f"{self.path} is damaged: {unit.what} (bytes {begin} to {end}) differs from its checksum: "
                        "pack the checkpoint again"
                    )
                progress(unit.end - unit.begin)
        finally:
            workers.shutdown(cancel_futures=True)

    # ---------------------------------------------------------------- inside

    def _units(self) -> Iterator[_Unit]:
        """The payload from its first byte to its last."""
        position = 0
        for segment in self.header.segments:
            if segment.offset_bytes > position:
                yield _Unit(f"the gap before {segment.name}", position, segment.offset_bytes, None)
            for e, checksum in enumerate(segment.sha256):
                begin = segment.offset_bytes + e * segment.unit_bytes
                what = segment.name if len(segment.sha256) == 1 else f"expert {e} of {segment.name}"
                yield _Unit(what, begin, begin + segment.unit_bytes, checksum)
            position = segment.offset_bytes + segment.size_bytes
        if self.header.packed_bytes > position:
            yield _Unit("the gap at the end", position, self.header.packed_bytes, None)

    def _sound(self, unit: _Unit) -> bool:
        data: Any = self.payload[unit.begin : unit.end]
        found = hashlib.sha256(data).hexdigest() == unit.sha256 if unit.sha256 is not None else not data.any()
        del data
        first = -(-(unit.begin + self.offset_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (unit.end + self.offset_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:  # the file stays in the page cache, but this process need not count it as its own
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        return found


def _shapes(segments: Iterable[PackedSegment]) -> str:
    """Type and shape of the experts' first projection, as in `up float32 8x56x1x2x16`."""
    up = next((s for s in segments if s.name == "up"), None)
    return "unknown" if up is None else f"up {up.dtype} {'x'.join(map(str, up.shape))}"


def payload_for(
    artifact: Artifact, path: str | os.PathLike[str], verify: bool, reading: Mapping[str, object]
) -> npt.NDArray[np.uint8]:
    """The packed weights in a file as a read-only map, when they are for this artifact.

    Args:
        verify: read all of the file and compare it with its checksums.
        reading: arguments that say how a checkpoint is read, which has been done already.

    Raises:
        WeightsError: the file is damaged, was packed for something else, or an argument of `reading` is given.
    """
    if given := [name for name, value in reading.items() if value]:
        raise WeightsError(f"{given[0]} is for checkpoints, and {os.fsdecode(path)} is packed already: leave it out")
    pack = MoePack(path)
    pack.check_fits(artifact)
    if verify:
        pack.verify()
    return pack.payload
