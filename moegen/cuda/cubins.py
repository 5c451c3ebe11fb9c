"""What is in machine code for a GPU: a cubin is an ELF file, whose `.nv.info` sections say what each kernel uses.

The layout is not documented by NVIDIA. Names of attributes are those that `cuobjdump -elf` prints; values were compared with what
`ptxas -v` says for every architecture, and a test still does.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from ..errors import BuildError
from .architectures import RESERVED_SHARED_BYTES

_MACHINE_CUDA = 190
_NOBITS = 8
_FORMAT_SIZED = 4  # of an attribute whose value follows it; those of the other formats hold it in their four bytes

# EIATTR_...
_MAX_THREADS = 0x05
_FRAME_SIZE = 0x11
_MIN_STACK_SIZE = 0x12
_REGCOUNT = 0x2F


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel uses.

    Args:
        registers: 32-bit registers of each thread.
        static_shared_bytes: shared memory of each block, without dynamic shared memory and what the system keeps.
        stack_bytes: local memory of each thread; where it is 0, nothing was spilled.
        constant_bytes: constant bank 0, where the parameters are.
        max_threads: largest block by the kernel's own launch bounds; 0 where it has none.
        code_bytes: instructions.
    """

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    constant_bytes: int
    max_threads: int
    code_bytes: int


@dataclasses.dataclass(frozen=True)
class _Section:
    name: str
    size: int
    data: bytes


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of a cubin uses, by the kernels' names.

    Raises:
        BuildError: it is no cubin.
    """
    try:
        sections = {section.name: section for section in _sections(cubin)}
        return {name: _resources(name, sections) for name in sorted(_kernels(sections))}
    except (struct.error, UnicodeDecodeError, IndexError, KeyError) as error:
        raise BuildError(f"a cubin is damaged, or of a compiler that moegen does not know: {error}") from error


def _sections(cubin: bytes) -> Iterator[_Section]:
    if cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18) != (_MACHINE_CUDA,):
        raise BuildError("this is not machine code for a GPU (not a 64-bit ELF file for CUDA)")
    (start,) = struct.unpack_from("<Q", cubin, 40)
    each, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    # Of a section's header: where its name is, its type, flags, address, offset and size.
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + index * each) for index in range(count)]
    names = headers[names_at][4]
    for name, kind, _, _, offset, size in headers:
        data = b"" if kind == _NOBITS else cubin[offset : offset + size]
        yield _Section(_string(cubin, names + name), size, data)


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode() if start < len(data) else ""


def _kernels(sections: dict[str, _Section]) -> set[str]:
    """Functions that can be launched: each has attributes of its own."""
    return {name.removeprefix(".nv.info.") for name in sections if name.startswith(".nv.info.")}


def _resources(kernel: str, sections: dict[str, _Section]) -> Resources:
    symbols = _symbols(sections)
    of_module = {
        attribute: words[1]
        for attribute, words in _attributes(sections[".nv.info"].data)
        if len(words) == 2 and symbols[words[0]] == kernel
    }
    threads = dict(_attributes(sections[f".nv.info.{kernel}"].data)).get(_MAX_THREADS, (0,))
    shared = sections[f".nv.shared.{kernel}"].size if f".nv.shared.{kernel}" in sections else 0
    if shared and ".nv.shared.reserved.0" in sections:  # from sm_90 on the system's part counts
        shared -= RESERVED_SHARED_BYTES
    return Resources(
        registers=of_module[_REGCOUNT],
        static_shared_bytes=shared,
        stack_bytes=max(of_module.get(_MIN_STACK_SIZE, 0), of_module.get(_FRAME_SIZE, 0)),
        constant_bytes=sections[f".nv.constant0.{kernel}"].size,
        max_threads=_product(threads),
        code_bytes=sections[f".text.{kernel}"].size,
    )


def _product(words: tuple[int, ...]) -> int:
    product = 1
    for word in words:
        product *= word
    return product


def _symbols(sections: dict[str, _Section]) -> list[str]:
    table, strings = sections[".symtab"].data, sections[".strtab"].data
    return [_string(strings, name) for name, *_ in struct.iter_unpack("<IBBHQQ", table)]


def _attributes(info: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(attribute, 32-bit words of its value) of those that have a value of that kind."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _FORMAT_SIZED:
            if size % 4 == 0:
                yield attribute, struct.unpack_from(f"<{size // 4}I", info, at)
            at += size
