"""Packing into a file, expert by expert: memory stays near one expert, and the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import mmap
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, check_loadable
from ..display import size
from ..errors import WeightsError
from ..moepack import is_moepack
from ..moepack_format import Header
from ..packing import Packer, RowLayout, part_of
from ..runtime import Module
from ..weights import WeightSource

_TEMPORARY = ".packing-"
_YOUNG_SECONDS = 5
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has no name for it before 3.13; the number is Linux's


def write(
    artifact: Artifact,
    source: WeightSource,
    out: pathlib.Path,
    header: Header,
    threads: int | None = None,
    release: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Packs a layer into a file, replacing one that is there.

    Args:
        artifact: what to pack for.
        header: of the file, without checksums.
        threads: that pack, for CPUs; None for all processors.
        release: called after each expert, when nothing that the source has read is needed any more.
        progress: called with the bytes that have been written since it was last called.

    Raises:
        WeightsError: a value of the source is wrong, or the file cannot be written; whatever was at `out` is still there.
        ArtifactError: for CPUs, this machine cannot run the artifact, whose own code packs.
    """
    _check_replaceable(out)
    scratch = _scratch(header.packed_bytes)
    packer = _packer(artifact, np.frombuffer(scratch, np.uint8), threads)
    try:
        with _replacing(out, len(header.encoded()) + header.packed_bytes) as file:
            stream = _Stream(file, header, scratch, progress)
            packer.router(source)
            stream.take("router")
            for e in range(artifact.config.experts):
                packer.experts(source, [e])
                stream.take("experts", e)
                release()
            packer.shared(source)
            stream.take("shared")
            _write_at(file, memoryview(stream.finished().encoded()), 0)
    except OSError as error:
        needs = f", it needs {size(header.packed_bytes)}" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise WeightsError(f"cannot write {str(out)!r}: {error.strerror or error}{needs}") from error


def _packer(artifact: Artifact, blob: npt.NDArray[np.uint8], threads: int | None) -> Packer:
    """A device's layout is made here in host memory, with or without a device."""
    if artifact.target.kind == "cuda":
        return Packer(artifact.manifest, RowLayout(artifact.manifest), 0, blob)
    check_loadable(artifact)
    module = Module(artifact, threads)
    return module.packer(module.threads, blob)


def _scratch(nbytes: int) -> mmap.mmap:
    """Zeros where all of the packed weights would have their place, of which memory is taken for what is written alone."""
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise WeightsError(f"cannot reserve {size(nbytes)} of addresses to pack in: {error.strerror}") from error


class _Stream:
    """Takes what was packed out of the scratch memory into the file, and notes the checksums."""

    def __init__(self, file: int, header: Header, scratch: mmap.mmap, progress: Callable[[int], object]) -> None:
        self._file, self._header, self._scratch, self._progress = file, header, scratch, progress
        self._start = len(header.encoded())
        self._checksums = [list(segment.sha256) for segment in header.segments]

    def take(self, part: str, e: int = 0) -> None:
        """What `part` of the packer, for an expert, has written; the memory is given back and is zeros again."""
        with memoryview(self._scratch) as view:
            for segment, checksums in zip(self._header.segments, self._checksums, strict=True):
                if part_of(segment.name) != part:
                    continue
                begin = segment.offset_bytes + e * segment.unit_bytes
                with view[begin : begin + segment.unit_bytes] as data:
                    checksums[e] = hashlib.sha256(data).hexdigest()
                    _write_at(self._file, data, self._start + begin)
                self._progress(segment.unit_bytes)
        self._scratch.madvise(mmap.MADV_DONTNEED)

    def finished(self) -> Header:
        """The header with all checksums."""
        known = zip(self._header.segments, self._checksums, strict=True)
        segments = tuple(dataclasses.replace(segment, sha256=tuple(checksums)) for segment, checksums in known)
        return dataclasses.replace(self._header, segments=segments)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


# ---------------------------------------------------------------- the file


def _check_replaceable(out: pathlib.Path) -> None:
    """That packing would not replace a file of another kind, such as the checkpoint itself."""
    if out.is_dir():
        raise WeightsError(f"{str(out)!r} is a folder: name the file to write")
    if out.exists() and not (out.is_file() and (out.stat().st_size == 0 or is_moepack(out))):
        raise WeightsError(f"{str(out)!r} is there already and not a file of packed weights: it will not be replaced")


@contextlib.contextmanager
def _replacing(out: pathlib.Path, nbytes: int) -> Iterator[int]:
    """A descriptor of a new file of this size, all zeros, that takes the place of `out` at the end, or goes when anything fails.

    The space is taken at once, so that a full disk is known before any work is done.
    """
    _clear_leftovers(out.parent)
    temporary = out.parent / f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}"
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)  # nobody clears it away
        os.posix_fallocate(file, 0, nbytes)
        yield file
        os.fsync(file)
        os.rename(temporary, out)
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _clear_leftovers(folder: pathlib.Path) -> None:
    """Removes what killed processes left; a file that is being written is locked."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > _YOUNG_SECONDS:  # else it may be about to be locked
                leftover.unlink()
