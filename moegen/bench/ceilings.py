"""What this machine can do at most, measured beside the layers: multiply-adds in registers and reads from memory.

The machine under a benchmark is rarely alone, so that its limits are measured again and again between the contenders' turns:
a fraction of the roofline then compares a time with limits that met the same machine. Matrix tiles (AMX) are not probed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import statistics
import subprocess
import tempfile

from ..errors import BuildError
from ..machine import this_machine
from ..paths import package_folder
from ..toolchain import cxx

FMA = "fma"
BF16_DOT = "vdpbf16ps"
_PROBE_SECONDS = 0.005
_LEAST_ROUNDS = 10_000
_LEAST_READ_BYTES = 128 << 20
_MOST_READ_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The limits that a point was measured under: medians, and the samples behind them.

    Args:
        kind: which instruction gives the arithmetic limit, `fma` (float32) or `vdpbf16ps` (pairs of bfloat16).
        flops_samples: operations a second, a multiply-add being two.
        read_samples: bytes a second.
    """

    kind: str
    flops_samples: tuple[float, ...]
    read_samples: tuple[float, ...]

    @property
    def flops_per_s(self) -> float:
        return statistics.median(self.flops_samples)

    @property
    def read_bytes_per_s(self) -> float:
        return statistics.median(self.read_samples)

    def roofline_seconds(self, flops: float, read_bytes: float) -> float:
        """The least time for so much work, whichever limit is the tighter."""
        return max(flops / self.flops_per_s, read_bytes / self.read_bytes_per_s)


class Probe:
    """The compiled probes, for one number of threads; a context manager, since it holds a buffer larger than the caches.

    Args:
        threads: threads of each probe, each pinned to a processor of its own.
        read_bytes: size of the buffer to read; None for several times the last-level cache.

    Raises:
        BuildError: there is no C++ compiler, or it cannot compile the probes.
    """

    def __init__(self, threads: int, read_bytes: int | None = None) -> None:
        self.threads = threads
        self._library = _compiled()
        step = threads * 1024
        wanted = read_bytes or min(max(4 * this_machine().l3_bytes, _LEAST_READ_BYTES), _MOST_READ_BYTES)
        self._bytes = -(-wanted // step) * step
        self._memory = self._library.probe_allocate(self._bytes)
        if not self._memory:
            raise BuildError(f"no memory for a probe of {self._bytes} bytes: free some, or measure with fewer threads")
        self._rounds: dict[str, int] = {}

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._library.probe_free(self._memory)
        self._memory = None

    def kind(self, dtype: str) -> str:
        """The instruction that limits a layer of this type here."""
        return BF16_DOT if dtype == "bfloat16" and self._library.probe_bf16_flops() else FMA

    def flops_per_s(self, kind: str) -> float:
        """One sample of the arithmetic limit, some milliseconds long."""
        seconds_of, per_round = {
            FMA: (self._library.probe_fma_seconds, self._library.probe_fma_flops()),
            BF16_DOT: (self._library.probe_bf16_seconds, self._library.probe_bf16_flops()),
        }[kind]
        rounds = self._rounds.get(kind, _LEAST_ROUNDS)
        while (seconds := seconds_of(self.threads, rounds)) < _PROBE_SECONDS:  # too short to hide how threads start and end
            rounds *= 2
        self._rounds[kind] = rounds
        return float(self.threads * rounds * per_round / seconds)

    def read_bytes_per_s(self) -> float:
        """One sample of the memory limit: every byte of the buffer once."""
        return float(self._bytes / self._library.probe_read_seconds(self.threads, self._memory, self._bytes))


def _compiled() -> ctypes.CDLL:
    """The probes for this very processor. The file may go once it is mapped."""
    command = cxx("measuring needs a C++ compiler for its probes")
    source = package_folder("templates") / "bench" / "probe.cc"
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "probe.so"
        for native in (["-march=native"], []):
            options = ["-O2", "-std=c++17", "-ffp-contract=fast", *native, "-shared", "-fPIC", "-pthread"]
            done = subprocess.run(
                [*command, *options, str(source), "-o", str(library)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return _declared(ctypes.CDLL(str(library)))
    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip() or "no output")
    raise BuildError(f"compiling the probes failed: {said}")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    threads, rounds, size, memory = ctypes.c_int, ctypes.c_long, ctypes.c_size_t, ctypes.c_void_p
    signatures = {
        "probe_fma_flops": ([], ctypes.c_double),
        "probe_bf16_flops": ([], ctypes.c_double),
        "probe_fma_seconds": ([threads, rounds], ctypes.c_double),
        "probe_bf16_seconds": ([threads, rounds], ctypes.c_double),
        "probe_allocate": ([size], memory),
        "probe_free": ([memory], None),
        "probe_read_seconds": ([threads, memory, size], ctypes.c_double),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
