"""A session with a measuring server: the helper there, what measures there, and how bytes get there whole.

The helper (`templates/tune`, compiled here for the server's architecture) does all that has to happen on the server, so that it
needs neither moegen nor a compiler. TVM's RPC carries some 50 MB/s.
"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import tempfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi.libinfo

from ..errors import BuildError, MeasureError, PlaceLost, without_rpc
from ..paths import package_folder
from ..toolchain import cxx_for, first_error
from . import kinds
from .wire import Line

try:
    from tvm import runtime
except ModuleNotFoundError as error:
    raise without_rpc(error) from None

Array = npt.NDArray[Any]

EXCHANGE_SECONDS = 120.0  # for one piece
_DESCRIBING_SECONDS = 60.0  # opening a device may take several
_HELPER = "remote.so"  # its name on the server
_TEXT_BYTES = 1 << 20
_SAID_BYTES = 512
_PIECE_BYTES = 32 << 20
_TRIES = 3  # of a piece that arrives damaged
_DIED, _LATE, _FAILED = 1, 2, 3  # endings, as helpers number them
_OF_CANDIDATE = 16


class Host:
    """A session with one server.

    Args:
        line: the session, which ends with the process.
        target: what is measured there, a target or its slug.
        arch: the server's architecture.

    Raises:
        PlaceLost: the server is gone.
        MeasureError: the helper does not run there, or there is nothing to measure on.
        BuildError: there is no C++ compiler for the helper.
    """

    def __init__(self, line: Line, target: str, arch: str) -> None:
        self.line, kind = line, kinds.of(target)
        with line.within(EXCHANGE_SECONDS, "loading the helper"):
            self.device = line.session.cpu(0)
            line.session.upload(bytearray(_helper(kind.HELPER, arch)), _HELPER)
            self._helper = line.session.load_module(_HELPER)
            self._functions: dict[str, Any] = {}
            self.call("shield")
        self.measurer = kind.elsewhere(str(line), self._fields(kind.WHAT))

    def _fields(self, what: str) -> dict[str, str]:
        """What the helper says of the machine.

        Raises:
            MeasureError: there is nothing to measure on.
        """
        with self.line.within(_DESCRIBING_SECONDS + EXCHANGE_SECONDS, "describing itself"):
            text, said = self.empty((_TEXT_BYTES,), "uint8"), Said(self)
            ending = self.call("machine", text, _DESCRIBING_SECONDS, said.tensor)
            if not well(ending):
                raise MeasureError(
                    f"{self.line} has no {what} to measure on ({said.how(ending, _DESCRIBING_SECONDS)}): "
                    "start servers of its key on machines that have one"
                )
            lines = text.numpy().tobytes().rstrip(b"\0").decode(errors="replace").splitlines()
        pairs = [line.partition(":")[::2] for line in reversed(lines) if ":" in line]  # the first processor's come last, and stay
        return {name.strip(): value.strip() for name, value in pairs}

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the helper returns; within an exchange."""
        if name not in self._functions:
            self._functions[name] = self._helper[f"remote_{name}"]
        return self._functions[name](*arguments)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory of the server; within an exchange."""
        return runtime.empty(shape, dtype, self.device)

    def put(self, array: Array) -> Any:
        """An array on the server, checked for having arrived whole; within an exchange.

        Raises:
            PlaceLost: it arrives damaged again and again.
        """
        whole = np.ascontiguousarray(array)
        wanted = zlib.crc32(whole.view(np.uint8).data) if whole.size else 0
        for _ in range(_TRIES):
            made = runtime.empty(whole.shape, whole.dtype.name, self.device).copyfrom(whole)
            if not whole.size or self.call("checksum", made) == wanted:
                return made
        raise PlaceLost(f"what is sent to {self.line} arrives damaged: {_TRIES} times out of {_TRIES}")

    def write(self, array: Array, blob: Any, offset: int, doing: str) -> None:
        """Sends an array's bytes to an offset of a blob on the server, piece by piece.

        Raises:
            PlaceLost, MeasureError: as `Line.within` has them.
        """
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.nbytes, _PIECE_BYTES):
            with self.line.within(EXCHANGE_SECONDS, doing):
                self.call("copy", self.put(data[start : start + _PIECE_BYTES]), blob, offset + start)


class Said:
    """What a child on a server says when it fails; made and read within an exchange."""

    def __init__(self, host: Host) -> None:
        self.tensor = host.empty((_SAID_BYTES,), "uint8")

    def how(self, ending: int, limit: float) -> str:
        """How the child ended that ended so."""
        text = self.tensor.numpy().tobytes().partition(b"\0")[0].decode(errors="replace").partition("\n")[0]
        how = ending % _OF_CANDIDATE
        return {_DIED: f"ended by {text}", _LATE: f"not done after {limit:.0f} s", _FAILED: f"failed: {text}"}[how]


def well(ending: int) -> bool:
    """Whether a child ended well."""
    return ending % _OF_CANDIDATE == 0


def of_candidate(ending: int) -> bool:
    """Whether a child that did not end well was at the candidate."""
    return ending >= _OF_CANDIDATE


def status(ending: int) -> str:
    """What records call such an ending."""
    return "timeout" if ending % _OF_CANDIDATE == _LATE else "runtime"


@functools.cache
def _helper(name: str, arch: str) -> bytes:
    """A helper's library for an architecture."""
    folder = package_folder("templates") / "tune"
    with tempfile.TemporaryDirectory() as work:
        library = pathlib.Path(work) / _HELPER
        options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc"]
        options += ["-Wl,--exclude-libs,ALL", "-Wl,-s", *(f"-I{path}" for path in tvm_ffi.libinfo.include_paths())]
        command = [*cxx_for(arch), *options, str(folder / f"{name}.cc"), "-o", str(library), "-ldl"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise BuildError(f"compiling the helper for measuring servers failed: {first_error(done.stdout)}")
        return library.read_bytes()
