"""moegen's side of a session on a measuring server: what it leaves there, and what it asks for.

A guest brings the default's library and the workload's packed weights, and then has candidates measured by the helper in processes
that inherit those weights. They stay as long as the session does, and are gone with it. `processor_guest` and `device_guest` are
the two kinds.
"""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..bench import workload
from ..errors import CandidateError, MeasureError
from ..packing import Packer
from ..weights import resolve
from . import kinds
from .host import EXCHANGE_SECONDS, Host, Said, of_candidate, status, well

Array = npt.NDArray[Any]

DEFAULT, _CANDIDATE = "default.so", "candidate.so"  # their names on the server; the helper knows them


class Guest(abc.ABC):
    """A guest for candidates for one default.

    Args:
        host: the session.
        default: the artifact that candidates are compared with.
        copies: of the packed weights, which timed calls take in turn.

    Raises:
        PlaceLost: the server is gone.
        TargetError, MeasureError: the server cannot run the default's code.
    """

    def __init__(self, host: Host, default: Artifact, copies: int) -> None:
        self.host, self.line, self.default = host, host.line, default
        kinds.of(default.target).check(default.config, default.target, host.measurer)
        with self.line.within(EXCHANGE_SECONDS, "loading the default"):
            self.line.session.upload(bytearray(default.library.read_bytes()), DEFAULT)
        with self.line.within(EXCHANGE_SECONDS, "making room for the weights"):
            self.blobs = self.room(int(default.manifest["packed_bytes"]), copies)
        self._packed: dict[str, Stamp] = {}
        self._batches: dict[tuple[pathlib.Path, int], tuple[Stamp, Any]] = {}

    @abc.abstractmethod
    def room(self, packed_bytes: int, copies: int) -> list[Any]:
        """Memory for the copies of the weights; within an exchange."""

    @abc.abstractmethod
    def packer(self) -> Packer:
        """What packs weights into the first of them."""

    def packed(self) -> None:  # noqa: B027 - a device's children copy the first one themselves
        """Makes the other copies like the first one, where the server holds them."""

    def patience(self, limit: float) -> float:
        """Seconds after which a child is killed whose work should be done after `limit`."""
        return limit

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
        packer = self.packer()
        changed = [part for part, stamp in stamps.items() if self._packed.get(part) != stamp]
        self._packed = {}  # nothing is known to be whole until everything is
        if "experts" in changed:
            packer.experts(source, range(self.default.config.experts))
        packer.router(source)
        packer.shared(source)
        self.packed()
        self._packed = stamps

    def batches(self, folder: pathlib.Path, tokens: int) -> Any:
        """The batches of T=`tokens` [B, T, H] on the server."""
        stamp, known = batch_stamp(folder, tokens), self._batches.get((folder, tokens))
        if known is None or known[0] != stamp:
            read = np.stack([batch.data for batch in workload.read_batches(folder, tokens)])
            with self.line.within(EXCHANGE_SECONDS, "taking batches"):
                known = self._batches[folder, tokens] = stamp, self.host.put(read)
        return known[1]

    def keep(self, wanted: set[tuple[pathlib.Path, int]]) -> None:
        """Forgets the batches of all other workloads and sizes."""
        with self.line.within(EXCHANGE_SECONDS, "forgetting batches"):
            for point in set(self._batches) - wanted:
                del self._batches[point]

    # ---------------------------------------------------------------- what it asks for

    def take(self, candidate: Artifact) -> None:
        """The candidate that is measured from here on."""
        with self.line.within(EXCHANGE_SECONDS, "taking the candidate"):
            self.line.session.upload(bytearray(candidate.library.read_bytes()), _CANDIDATE)

    def answers(self, x: Any, rows: Sequence[Sequence[int]], threads: int, limit: float) -> tuple[Array, Array]:
        """One call of both libraries for each of the batches `x`, with poisoned outputs.

        Args:
            rows: of each batch, the tokens whose outputs are wanted, ascending.
            limit: seconds after which the process that calls is killed, beside those that weights take to a device.

        Returns:
            ([2, tokens, H] in storage type, float64 seconds [2, B]); when the first call is slow, the others are left out, and
            their seconds are 0.

        Raises:
            CandidateError: the candidate crashed, hung or failed.
            PlaceLost, MeasureError: as `Line.within` has them, and when the default crashed, hung or failed.
        """
        host, limit = self.host, self.patience(limit)
        batches, tokens, hidden = (int(n) for n in x.shape)
        flat = np.array([b * tokens + t for b, chosen in enumerate(rows) for t in chosen], np.int32)
        with self.line.within(limit + EXCHANGE_SECONDS, "checking a candidate"):
            out, seconds = host.empty((2, len(flat), hidden), x.dtype), host.empty((2, batches), "float64")
            said = Said(host)
            ending = host.call("answers", x, host.put(flat), self.blobs[0], threads, limit, out, seconds, said.tensor)
            self._judge(ending, said, limit)
            return out.numpy(), seconds.numpy()

    def times(self, x: Any, threads: int, rounds: int, turn_seconds: float, limit: float) -> list[list[float]]:
        """[default, candidate], each with the seconds of a call in each round; who begins changes from round to round.

        The clock is the server's or its device's, so that neither the network nor Python is in the times.

        Args:
            turn_seconds: what the default's turn in a round takes, about.
            limit: as of `answers`.

        Raises:
            CandidateError, PlaceLost, MeasureError: as `answers`.
        """
        host, limit = self.host, self.patience(limit)
        with self.line.within(limit + EXCHANGE_SECONDS, "timing a candidate"):
            seconds, said = host.empty((2, rounds), "float64"), Said(host)
            ending = host.call("times", x, threads, rounds, turn_seconds, limit, seconds, said.tensor, *self.blobs)
            self._judge(ending, said, limit)
            samples: list[list[float]] = seconds.numpy().tolist()
            return samples

    def _judge(self, ending: int, said: Said, limit: float) -> None:
        if well(ending):
            return
        if not of_candidate(ending):
            raise MeasureError(f"the default on {self.line}: {said.how(ending, limit)}")
        raise CandidateError(f"the candidate on {self.line}: {said.how(ending, limit)}", status(ending))


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
