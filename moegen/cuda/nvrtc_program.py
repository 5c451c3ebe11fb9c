"""A compiler's command line around NVRTC: a program of its own, so that several run at once and a crash takes nothing along.

    python nvrtc_program.py LIBRARY BUILTINS SOURCE OUTPUT -cubin|-ptx OPTION...

It needs nothing but the standard library, prints what NVRTC says, and writes the machine code or PTX.
"""

from __future__ import annotations

import ctypes
import pathlib
import sys


class Nvrtc:
    """The functions of libnvrtc that compile one program."""

    def __init__(self, library: str, builtins: str) -> None:
        ctypes.CDLL(builtins)  # NVRTC loads it by name, and then finds this one
        self.library = ctypes.CDLL(library)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.program = ctypes.c_void_p()

    def compile(self, source: bytes, name: str, options: list[str]) -> bool:
        """Whether the source compiles."""
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(self.program), source, name.encode(), 0, None, None))
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        return int(self.library.nvrtcCompileProgram(self.program, len(options), encoded)) == 0

    def get(self, what: str) -> bytes:
        """What there is of the program: `ProgramLog`, `CUBIN` or `PTX`."""
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(self.program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(self.program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise SystemExit(f"nvrtc: error: {self.library.nvrtcGetErrorString(status).decode()}")


def main(library: str, builtins: str, source: str, output: str, kind: str, *options: str) -> None:
    """Compiles `source` to `output`.

    Args:
        kind: `-cubin` or `-ptx`.

    Raises:
        SystemExit: it does not compile.
    """
    nvrtc = Nvrtc(library, builtins)
    path = pathlib.Path(source)
    done = nvrtc.compile(path.read_bytes(), path.name, list(options))
    sys.stdout.write(nvrtc.get("ProgramLog").rstrip(b"\0").decode(errors="replace"))
    if not done:
        raise SystemExit(1)
    made = nvrtc.get("CUBIN") if kind == "-cubin" else nvrtc.get("PTX").rstrip(b"\0")
    pathlib.Path(output).write_bytes(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
