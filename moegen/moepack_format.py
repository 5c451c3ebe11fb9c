"""How a file of packed weights begins: a prelude of fixed size, a JSON header, zeros up to the payload.

The prelude (`_PRELUDE`, little-endian) is for readers without a JSON parser. The header has the checksums of the payload, for each
segment and expert; the prelude has that of the header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import IO

from .artifact import Artifact
from .config import MoEConfig
from .errors import ConfigError, WeightsError
from .packing import layout_key, part_of
from .target import KINDS

MAGIC = b"\x93MOEPACK"
VERSION = 1
MAX_HEADER_BYTES = 64 << 20
ALIGNMENT_BYTES = 4096  # of the payload in the file
# magic, version, bytes of the header, offset and bytes of the payload, H, E, K, DLPack's type of tokens (code, bits, lanes) and of
# the device (1 for a processor, 2 for CUDA), zero, the layout's key in hexadecimal, SHA-256 of the header, zeros
_PRELUDE = struct.Struct("<8s2I2Q3I2BH2I64s32s40x")
_DLPACK_FLOATS = {"float32": (2, 32, 1), "float16": (2, 16, 1), "bfloat16": (4, 16, 1)}
_DLPACK_DEVICES = {"llvm": 1, "cuda": 2}
_UNKNOWN = "0" * 64  # a checksum that is not known yet
_HEX = frozenset("0123456789abcdef")


@dataclasses.dataclass(frozen=True)
class PackedSegment:
    """One array in the packed weights.

    Args:
        name, dtype, shape, offset_bytes, size_bytes: as in the artifact's manifest.
        sha256: of its parts of equal size: one for each routed expert, or one in all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    sha256: tuple[str, ...]

    @property
    def unit_bytes(self) -> int:
        """Bytes that one checksum is of."""
        return self.size_bytes // len(self.sha256)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its payload.

    Args:
        config: the layer.
        target: kind of target that the layout is for, `llvm` or `cuda`.
        layout: `packing.layout_key` of the artifacts that take it.
        packed_bytes: of the payload.
        segments: arrays in the payload, by offset.
        artifact: name and key of the artifact that it was packed with.
        source: file (name) and prefix that the weights come from.
        versions: of what wrote it.
    """

    config: MoEConfig
    target: str
    layout: str
    packed_bytes: int
    segments: tuple[PackedSegment, ...]
    artifact: Mapping[str, str]
    source: Mapping[str, str]
    versions: Mapping[str, str]

    def encoded(self) -> bytes:
        """Everything in front of the payload; its size does not depend on the checksums."""
        plain = dataclasses.asdict(self) | {"config": self.config.to_dict()}
        text = json.dumps(plain, separators=(",", ":")).encode()
        return self.in_front(text, _payload_offset(len(text)))

    def in_front(self, text: bytes, offset: int) -> bytes:
        """Prelude, JSON text and zeros up to the offset of the payload."""
        c = self.config
        sizes = (c.hidden, c.experts, c.top_k, *_DLPACK_FLOATS[c.dtype], _DLPACK_DEVICES[self.target], 0)
        places = (len(text), offset, self.packed_bytes)
        prelude = _PRELUDE.pack(MAGIC, VERSION, *places, *sizes, self.layout.encode(), hashlib.sha256(text).digest())
        return (prelude + text).ljust(offset, b"\0")


def header_for(artifact: Artifact, source: Mapping[str, str], versions: Mapping[str, str]) -> Header:
    """The header of weights that will be packed for an artifact, without checksums yet."""
    manifest, experts = artifact.manifest, artifact.config.experts
    segments = []
    for segment in manifest["segments"]:
        unknown = (_UNKNOWN,) * (experts if part_of(segment["name"]) == "experts" else 1)
        segments.append(PackedSegment(**{**segment, "shape": tuple(segment["shape"])}, sha256=unknown))
    made_for = {"name": artifact.name, "key": str(manifest["key"])}
    layout, size = layout_key(manifest), int(manifest["packed_bytes"])
    return Header(artifact.config, artifact.target.kind, layout, size, tuple(segments), made_for, source, versions)


def read(file: IO[bytes], size: int, path: str) -> tuple[Header, bytes]:
    """The header, and everything in front of the payload.

    Args:
        file: at its beginning.
        size: of the file.
        path: what the messages call it.

    Raises:
        WeightsError: it is not of this kind, truncated, damaged, or written by a newer moegen.
    """
    front = file.read(_PRELUDE.size)
    if front[: len(MAGIC)] != MAGIC:
        kind = "it is empty" if not front else f"it begins with {front[: len(MAGIC)]!r}"
        raise WeightsError(f"{path} is not a file of packed weights ({kind}); `moegen pack` writes them")
    if len(front) < _PRELUDE.size:
        raise _bad(path, f"it has {size} bytes, less than the {_PRELUDE.size} of its prelude")
    _, version, header_bytes, offset, payload_bytes, *_, digest = _PRELUDE.unpack(front)
    if version != VERSION:
        newer = "newer than this moegen reads" if version > VERSION else "which does not exist"
        raise WeightsError(f"{path} has format {version}, {newer} ({VERSION}): upgrade it, or pack the checkpoint again")
    if header_bytes > MAX_HEADER_BYTES or offset != _payload_offset(header_bytes):
        raise _bad(path, f"it says that its header has {header_bytes} bytes and its payload is at {offset}")
    if offset + payload_bytes != size:
        kind = "truncated" if offset + payload_bytes > size else "too long"
        raise _bad(path, f"it is {kind}, {size} bytes instead of {offset + payload_bytes}")
    text = file.read(header_bytes)
    if hashlib.sha256(text).digest() != digest:
        raise _bad(path, "its header differs from its checksum")
    header = _parsed(text, path)
    front += text + file.read(offset - _PRELUDE.size - header_bytes)
    if header.packed_bytes != payload_bytes or front != header.in_front(text, offset):
        raise _bad(path, "its prelude and its header contradict one another")
    return header, front


def _parsed(text: bytes, path: str) -> Header:
    try:
        raw = json.loads(text.decode("utf-8"))
        config = MoEConfig.from_dict(raw["config"])
        segments = tuple(PackedSegment(**{**s, "shape": tuple(s["shape"]), "sha256": tuple(s["sha256"])}) for s in raw["segments"])
        header = Header(**{**raw, "config": config, "segments": segments})
    except ConfigError as error:
        reason = str(error).partition(";")[0]
        raise _bad(path, f"its header has a layer that this moegen does not know ({reason})") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad(path, f"its header is malformed ({type(error).__name__})") from error
    if problem := next(_problems(header), None):
        raise _bad(path, problem)
    return header


def _bad(path: str, what: str) -> WeightsError:
    return WeightsError(f"{path} is not a sound file of packed weights: {what}: pack the checkpoint again")


def _problems(header: Header) -> Iterator[str]:
    """What is impossible in a header whose checksum is right: another program wrote it."""
    if header.target not in KINDS or not _sha256(header.layout):
        yield f"target={header.target!r} or layout={header.layout!r} is impossible"
    for name in ("artifact", "source", "versions"):
        value = getattr(header, name)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            yield f"{name} is not an object of strings"
    if not isinstance(header.artifact.get("name"), str):
        yield "artifact has no name"
    if not _whole(header.packed_bytes) or header.packed_bytes >= 1 << 63 or not header.segments:
        yield f"packed_bytes={header.packed_bytes!r} is impossible, or there are no segments"
    ends = [0]
    for segment in header.segments:
        numbers = (segment.offset_bytes, segment.size_bytes, *segment.shape)
        if not isinstance(segment.name, str) or not isinstance(segment.dtype, str) or not all(map(_whole, numbers)):
            yield f"segment {segment.name!r} has impossible sizes"
        if segment.offset_bytes < ends[-1]:
            yield f"segment {segment.name!r} overlaps the one before it"
        ends.append(segment.offset_bytes + segment.size_bytes)
        parts = len(segment.sha256)
        if not parts or not all(map(_sha256, segment.sha256)) or segment.size_bytes % parts:
            yield f"segment {segment.name!r} has impossible checksums"
    if ends[-1] > header.packed_bytes:
        yield f"the segments end at {ends[-1]}, the payload at {header.packed_bytes}"


def _payload_offset(header_bytes: int) -> int:
    return -(-(_PRELUDE.size + header_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX
