"""Machine code and PTX as an object file, to be linked into a module's library."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Mapping

from ..errors import BuildError
from ..target import host_arch
from ..toolchain import cxx_for, first_error

ALIGN_BYTES = 64


def symbol(name: str) -> str:
    """The symbol of an image, as TVM_FFI_EMBED_CUBIN(name) of tvm_ffi's cubin launcher expects it; its end is `..._end`."""
    return f"__tvm_ffi__cubin_{name}"


def embed(images: Mapping[str, bytes], folder: pathlib.Path, arch: str | None = None) -> pathlib.Path:
    """An object file with images in read-only data, for the linker.

    Each has two hidden symbols, its first byte and the byte after its last, which is 0: what loads PTX looks for that.

    Args:
        images: by names that are identifiers of C.
        folder: gets `images.o`, and what it is made of.
        arch: architecture of the machine that the library is for; None for this one.

    Raises:
        BuildError: there is no C++ compiler, or it fails.
    """
    lines = ['.section .note.GNU-stack,"",%progbits', ".section .rodata"]
    for name, data in images.items():
        (folder / f"{name}.image").write_bytes(data)
        start, end = symbol(name), f"{symbol(name)}_end"
        lines += [f".balign {ALIGN_BYTES}", f".globl {start}", f".hidden {start}", f".globl {end}", f".hidden {end}"]
        lines += [f"{start}:", f'.incbin "{name}.image"', f"{end}:", ".byte 0"]
    (folder / "images.s").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [*cxx_for(arch or host_arch()), "-c", "images.s", "-o", "images.o"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"embedding the kernels failed: {first_error(done.stdout)}")
    return folder / "images.o"
