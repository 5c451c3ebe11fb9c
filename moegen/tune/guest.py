"""moegen's side of a session on a measuring server: what it brings there, what it leaves there, what it asks for.

A guest brings a helper (`templates/tune/remote.cc`, compiled here for the server's architecture) and the default's library, packs
the workload's weights into the server's memory with it, and then has candidates measured by the helper in processes that
inherit those weights. TVM's RPC carries some 50 MB/s, so weights stay as long as the session does.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi.libinfo

from ..artifact import Artifact
from ..bench import workload
from ..errors import BuildError, CandidateError, MeasureError, without_rpc
from ..packing import Packer
from ..paths import package_folder
from ..target import missing_features
from ..toolchain import cxx_for
from ..weights import resolve
from .wire import Line

try:
    from tvm import runtime
except ModuleNotFoundError as error:
    raise without_rpc(error) from None

Array = npt.NDArray[Any]

_EXCHANGE_SECONDS = 120.0  # for one matrix of an expert
_HELPER, _DEFAULT, _CANDIDATE = "remote.so", "default.so", "candidate.so"  # their names on the server; the helper knows them
_FIELDS = ("model name", "flags", "cpu family", "model", "stepping")
_FUNCTIONS = ("shield", "processor", "huge", "copy", "answers", "times")
_CPUINFO_BYTES = 1 << 20
_SAID_BYTES = 512
_DIED, _LATE, _FAILED = 1, 2, 3  # endings, as the helper numbers them
_OF_CANDIDATE = 16


class Guest:
    """A session with one server, for candidates for one default.

    Args:
        line: the session, which ends with the process.
        default: the artifact that candidates are compared with.
        copies: of the packed weights, which timed calls take in turn.

    Raises:
        PlaceLost: the server is gone.
        MeasureError: the server cannot run the default's code.
        BuildError: there is no C++ compiler for the helper.
    """

    def __init__(self, line: Line, default: Artifact, copies: int) -> None:
        self.line, self.default = line, default
        with line.within(_EXCHANGE_SECONDS, "loading the helper"):
            self._device = line.session.cpu(0)
            line.session.upload(bytearray(_helper(default.target.arch)), _HELPER)
            helper = line.session.load_module(_HELPER)
            self._helper = {name: helper[f"remote_{name}"] for name in _FUNCTIONS}
            self._helper["shield"]()
            self.machine = self._machine()
        with line.within(_EXCHANGE_SECONDS, "loading the default"):
            line.session.upload(bytearray(default.library.read_bytes()), _DEFAULT)
            self._pack = line.session.load_module(_DEFAULT)["moe_pack"]
        with line.within(_EXCHANGE_SECONDS, "making room for the weights"):
            self._blobs = [self._blob(int(default.manifest["packed_bytes"])) for _ in range(copies)]
        self._packed: dict[str, Stamp] = {}
        self._batches: dict[tuple[pathlib.Path, int], tuple[Stamp, Any]] = {}

    def _machine(self) -> dict[str, Any]:
        """The server's address, processor, and how many processors it may use.

        Raises:
            MeasureError: it cannot run the default's code.
        """
        text = runtime.empty((_CPUINFO_BYTES,), "uint8", self._device)
        processors = int(self._helper["processor"](text))
        cpuinfo = text.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
        fields = {name: found[1] for name in _FIELDS if (found := re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE))}
        if missing := missing_features(self.default.target, frozenset(fields.get("flags", "").split())):
            raise MeasureError(
                f"{self.line} lacks {', '.join(missing)}, which code for {self.default.target.mcpu} needs: "
                "take servers of another key, or tune for another --mcpu"
            )
        parts = [f"{name} {fields[name]}" for name in _FIELDS[2:] if name in fields]
        cpu = ", ".join([fields.get("model name", "unknown"), *parts])
        return {"server": self.line.address, "processor": cpu, "processors": processors}

    # ---------------------------------------------------------------- what it leaves there

    def bring(self, folder: pathlib.Path) -> None:
        """Packs the weights of a workload, as far as they are not there already.

        Workloads that share files share what is packed from them; so those that differ in their routers pack the experts once.

        Raises:
            PlaceLost, MeasureError: as `Line.within` has them.
        """
        stamps = _stamps(folder)
        if self._packed == stamps:
            return
        source = resolve(self.default.config, workload.read_weights(folder))
        packer = _Packer(self)
        changed = [part for part, stamp in stamps.items() if self._packed.get(part) != stamp]
        self._packed = {}  # nothing is known to be whole until everything is
        if "experts" in changed:
            packer.experts(source, range(self.default.config.experts))
        packer.router(source)
        packer.shared(source)
        with self.line.within(_EXCHANGE_SECONDS, "copying the weights"):
            for blob in self._blobs[1:]:
                self._helper["copy"](self._blobs[0], blob, 0)
        self._packed = stamps

    def batches(self, folder: pathlib.Path, tokens: int) -> Any:
        """The batches of T=`tokens` [B, T, H] on the server."""
        stamp, known = batch_stamp(folder, tokens), self._batches.get((folder, tokens))
        if known is None or known[0] != stamp:
            read = np.stack([batch.data for batch in workload.read_batches(folder, tokens)])
            with self.line.within(_EXCHANGE_SECONDS, "taking batches"):
                known = self._batches[folder, tokens] = stamp, self.put(read)
        return known[1]

    def keep(self, wanted: set[tuple[pathlib.Path, int]]) -> None:
        """Forgets the batches of all other workloads and sizes."""
        with self.line.within(_EXCHANGE_SECONDS, "forgetting batches"):
            for point in set(self._batches) - wanted:
                del self._batches[point]

    def _blob(self, nbytes: int) -> Any:
        blob = runtime.empty((nbytes,), "uint8", self._device)
        self._helper["huge"](blob)
        return blob

    def put(self, array: Array) -> Any:
        """An array on the server."""
        return runtime.empty(array.shape, array.dtype.name, self._device).copyfrom(np.ascontiguousarray(array))

    # ---------------------------------------------------------------- what it asks for

    def take(self, candidate: Artifact) -> None:
        """The candidate that is measured from here on."""
        with self.line.within(_EXCHANGE_SECONDS, "taking the candidate"):
            self.line.session.upload(bytearray(candidate.library.read_bytes()), _CANDIDATE)

    def answers(self, x: Any, rows: Sequence[Sequence[int]], threads: int, limit: float) -> tuple[Array, Array]:
        """One call of both libraries for each of the batches `x`, with poisoned outputs.

        Args:
            rows: of each batch, the tokens whose outputs are wanted, ascending.
            limit: seconds after which the process that calls is killed.

        Returns:
            ([2, tokens, H] in storage type, float64 seconds [2, B]); when the first call is slow, the others are left out, and
            their seconds are 0.

        Raises:
            CandidateError: the candidate crashed, hung or failed.
            PlaceLost, MeasureError: as `Line.within` has them, and when the default crashed, hung or failed.
        """
        batches, tokens, hidden = (int(n) for n in x.shape)
        flat = np.array([b * tokens + t for b, chosen in enumerate(rows) for t in chosen], np.int32)
        with self.line.within(limit + _EXCHANGE_SECONDS, "checking a candidate"):
            out = runtime.empty((2, len(flat), hidden), x.dtype, self._device)
            seconds = runtime.empty((2, batches), "float64", self._device)
            said = runtime.empty((_SAID_BYTES,), "uint8", self._device)
            ending = self._helper["answers"](x, self.put(flat), self._blobs[0], threads, float(limit), out, seconds, said)
            self._judge(ending, said, limit)
            return out.numpy(), seconds.numpy()

    def times(self, x: Any, threads: int, rounds: int, turn_seconds: float, limit: float) -> list[list[float]]:
        """[default, candidate], each with the median seconds of a call in each round; who begins changes from round to round.

        The clock is read on the server, so that neither the network nor Python is in the times.

        Args:
            turn_seconds: what the default's turn in a round takes, about.
            limit: seconds after which the process that calls is killed.

        Raises:
            CandidateError, PlaceLost, MeasureError: as `answers`.
        """
        with self.line.within(limit + _EXCHANGE_SECONDS, "timing a candidate"):
            seconds = runtime.empty((2, rounds), "float64", self._device)
            said = runtime.empty((_SAID_BYTES,), "uint8", self._device)
            ending = self._helper["times"](x, threads, rounds, turn_seconds, float(limit), seconds, said, *self._blobs)
            self._judge(ending, said, limit)
            samples: list[list[float]] = seconds.numpy().tolist()
            return samples

    def _judge(self, ending: int, said: Any, limit: float) -> None:
        how = ending % _OF_CANDIDATE
        if not how:
            return
        text = said.numpy().tobytes().partition(b"\0")[0].decode(errors="replace").partition("\n")[0]
        what = {_DIED: f"ended by {text}", _LATE: f"not done after {limit:.0f} s", _FAILED: f"failed: {text}"}[how]
        if ending < _OF_CANDIDATE:
            raise MeasureError(f"the default on {self.line}: {what}")
        raise CandidateError(f"the candidate on {self.line}: {what}", "timeout" if how == _LATE else "runtime")


class _Packer(Packer):
    """Packs into a guest's first copy of the weights, with the library's `moe_pack` on the server."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest.default.manifest, functools.partial(_pack, guest), 0, guest._blobs[0])
        self.guest = guest

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        guest, offset = self.guest, int(self.segments[name][1]["offset_bytes"])
        with guest.line.within(_EXCHANGE_SECONDS, "packing weights"):
            guest._helper["copy"](guest.put(values), guest._blobs[0], offset)


def _pack(guest: Guest, blob: Any, segment: int, expert: int, first: Array, second: Array | None, pool: int) -> None:
    with guest.line.within(_EXCHANGE_SECONDS, "packing weights"):
        guest._pack(blob, segment, expert, guest.put(first), None if second is None else guest.put(second), pool)


# ---------------------------------------------------------------- files

# What tells files apart without reading them; equal for links to the same file.
Stamp = tuple[tuple[int, int, int, int], ...]


def batch_stamp(folder: pathlib.Path, tokens: int) -> Stamp:
    """Of the batches of T=`tokens` in a workload."""
    return _stamp([os.fspath(path) for path in sorted(folder.glob(f"batch-{tokens}-*.npy"))])


def _stamps(folder: pathlib.Path) -> dict[str, Stamp]:
    """Of the files that the experts are packed from, and of those of all else."""
    files = {name: os.fspath(array.data.filename) for name, array in workload.read_weights(folder).items()}  # type: ignore[attr-defined]
    experts = {name: file for name, file in files.items() if name.startswith("experts.")}
    return {
        "experts": _stamp([experts[name] for name in sorted(experts)]),
        "others": _stamp([files[name] for name in sorted(files.keys() - experts.keys())]),
    }


def _stamp(files: Sequence[str]) -> Stamp:
    found = [os.stat(file) for file in files]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


@functools.cache
def _helper(arch: str) -> bytes:
    """The helper's library for an architecture."""
    source = package_folder("templates") / "tune" / "remote.cc"
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / _HELPER
        options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc"]
        options += ["-Wl,--exclude-libs,ALL", "-Wl,-s", *(f"-I{path}" for path in tvm_ffi.libinfo.include_paths())]
        command = [*cxx_for(arch), *options, str(source), "-o", str(library), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip() or "no output")
            raise BuildError(f"compiling the helper for measuring servers failed: {said}")
        return library.read_bytes()
