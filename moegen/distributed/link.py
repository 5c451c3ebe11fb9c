"""Collectives with a deadline: a rank that is gone, stuck or at odds is an error on the others, not a hang."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import DistributedError
from .meeting import Meeting, described

GRACE_SECONDS = 2.0  # within which a rank that lives says so, after a collective broke
_SLICE_SECONDS = 0.5  # of waiting, between which Ctrl-C is heard, and ranks that failed
_REASON_BYTES = 1024

_links: weakref.WeakValueDictionary[tuple[Any, ...], Link] = weakref.WeakValueDictionary()
_meetings: dict[tuple[int, ...], int] = {}


class Pending:
    """A collective under way, with the memory that it uses."""

    def __init__(self, link: Link, work: Any, what: str, *buffers: torch.Tensor) -> None:
        self.link, self.work, self.what, self.buffers = link, work, what, buffers

    def wait(self) -> torch.Tensor:
        """What was received.

        Raises:
            DistributedError: a rank is gone or stuck.
        """
        try:
            self._wait()
        except RuntimeError as error:
            if isinstance(error, DistributedError):
                raise
            self.link.broke(self.what, error)
        return self.buffers[0]

    def _wait(self) -> None:
        if self.buffers[0].device.type != "cpu":  # torch's watchdog ends what takes too long on a device, by the group's timeout
            self.work.wait()
            return
        deadline = time.monotonic() + self.link.timeout_s
        while True:
            try:
                self.work.wait(datetime.timedelta(seconds=_SLICE_SECONDS))
                return
            except RuntimeError:
                if self.work.is_completed():  # then it is torch's last word, be it good or bad
                    self.work.wait()
                    return
                if time.monotonic() > deadline:
                    raise
                self.link.listen()


class Link:
    """The connections of some ranks: gloo for data on the processor, NCCL on CUDA devices.

    They are not a group that torch.distributed knows: its names for groups of some ranks depend on what other groups each of them
    is in, and differ where those do.

    A link that broke stays broken: what is under way on the others belongs to no call any more.

    Args:
        device: where the data is.
        timeout_s: seconds that a rank waits for the others in one collective.
        meeting: where ranks say that they are alive when the link broke.
    """

    def __init__(self, device: torch.device, timeout_s: float, meeting: Meeting) -> None:
        self.timeout_s, self.meeting = timeout_s, meeting
        self.rank, self.size = meeting.rank, meeting.size
        self.layers, self.broken, self.hears = 0, "", True
        self.world = weakref.ref(dist.group.WORLD)
        try:
            self.backend = _connected(meeting, device, datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            self.broke("connecting the ranks", error)

    def next_layer(self) -> int:
        """A number for another layer that uses the link, the same on all ranks."""
        self.layers += 1
        return self.layers

    def all_to_all(self, rows: torch.Tensor, counts: Sequence[int], coming: Sequence[int], what: str) -> Pending:
        """Sends rows [sum(counts), ...] to the ranks in order, counts[r] to rank r, and receives coming[r] from it.

        Raises:
            DistributedError: the link is broken.
        """
        self.check()
        sent = _as_bytes(rows)
        received = torch.empty((sum(coming), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        width = sent.numel() // max(len(rows), 1) or received[:1].numel() * rows.element_size()
        splits = [[count * width for count in part] for part in (coming, counts)]
        try:
            work = self.backend.alltoall_base(_as_bytes(received), sent, *splits, dist.AllToAllOptions())
        except (RuntimeError, ValueError) as error:
            self.broke(what, error)
        return Pending(self, work, what, received, sent)

    def all_headers(self, header: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
        """Sends one line of numbers to each rank and returns the lines that the ranks sent here.

        Raises:
            DistributedError: a rank is gone or stuck.
        """
        lines = torch.tensor(header, dtype=torch.int64, device=device)
        ones = [1] * self.size
        received: list[list[int]] = self.all_to_all(lines, ones, ones, "exchanging counts").wait().tolist()
        return received

    def all_reasons(self, reason: str, device: torch.device) -> list[str]:
        """What each rank says, empty where it has nothing to say.

        Raises:
            DistributedError: a rank is gone or stuck.
        """
        said = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(device).repeat(self.size, 1)
        ones = [1] * self.size
        theirs = self.all_to_all(mine, ones, ones, "exchanging reasons").wait().cpu()
        return [bytes(row.numpy()).rstrip(b"\0").decode(errors="ignore") for row in theirs]

    def check(self) -> None:
        """Raises a DistributedError when the link is broken."""
        if self.broken:
            raise DistributedError(f"{self.broken}; construct the layer again, once all ranks are there")

    def broke(self, what: str, error: BaseException) -> NoReturn:
        """Gives the link up and raises a DistributedError that says which ranks are missing.

        Args:
            what: the operation that failed.
            error: what torch says about it.
        """
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late = "time" in first.lower() and "out" in first.lower()
        why = f"{what} took longer than timeout_s={self.timeout_s:g}" if late else f"{what} failed ({_without_place(first)})"
        try:
            notes = self.meeting.gather("broken", "", GRACE_SECONDS)
        except DistributedError as gone:
            self._give_up(f"a rank is lost: {why}, and {gone}", (), error)
        missing = [rank for rank, note in enumerate(notes) if note is None]
        if failed := {rank: note for rank, note in enumerate(notes) if note}:
            self._give_up(_failures(failed), list(failed), error)
        if missing:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self.size}"
            self._give_up(f"{names} did not answer, gone or stuck: {why}", missing, error)
        self._give_up(f"all {self.size} ranks answer, but {why}", (), error)

    def leave(self, error: BaseException) -> None:
        """Gives the link up because this rank failed, and tells those who wait for it why."""
        self.broken = f"this rank failed in an earlier call ({described(error)})"
        with contextlib.suppress(DistributedError):
            self.meeting.leave("broken", described(error))

    def listen(self) -> None:
        """Raises a DistributedError when another rank has given the link up because it failed."""
        try:
            notes = self.meeting.read("broken") if self.hears else {}
        except DistributedError:  # without a store nothing is heard, and the connections tell who is gone
            self.hears = False
            return
        if failed := {rank: note for rank, note in notes.items() if note}:
            self._give_up(_failures(failed), list(failed), None)

    def _give_up(self, sentence: str, ranks: Sequence[int], error: BaseException | None) -> NoReturn:
        self.broken = sentence
        raise DistributedError(sentence, ranks) from error


def ranks_of(group: Any) -> tuple[int, ...]:
    """The ranks of a process group (None: of all) by their numbers in the world, ascending, this process's among them.

    Raises:
        DistributedError: there is no process group, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise DistributedError("torch.distributed has no process group: call torch.distributed.init_process_group first")
    ranks = tuple(sorted(dist.get_process_group_ranks(group or dist.group.WORLD)))
    if dist.get_rank() not in ranks:
        raise DistributedError(f"rank {dist.get_rank()} is not in the group, which has ranks {', '.join(map(str, ranks))}")
    return ranks


def meeting_of(ranks: tuple[int, ...]) -> Meeting:
    """Where these ranks agree on the next thing that they do together; every rank of them calls this equally often."""
    number = _meetings[ranks] = _meetings.get(ranks, 0) + 1
    name = f"{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}/{number}"
    store = dist.PrefixStore(f"moegen.distributed/{name}", dist.distributed_c10d._get_default_store())
    return Meeting(name, store, ranks.index(dist.get_rank()), len(ranks))


def link_of(ranks: tuple[int, ...], device: torch.device, meeting: Meeting, timeout_s: float, start_timeout_s: float) -> Link:
    """The link of these ranks: the one that all of them have already, or a new one.

    Raises:
        DistributedError: a rank is missing, or cannot be connected.
    """
    key = (ranks, device, timeout_s)
    known = _links.get(key)
    if known is not None and (known.broken or known.world() is not dist.group.WORLD):
        known = None
    names = meeting.agree("link", {}, None, start_timeout_s, says="" if known is None else known.meeting.name)
    if known is not None and set(names) == {known.meeting.name}:
        return known  # another rank may have freed its own, and then all make a new one
    link = _links[key] = Link(device, timeout_s, meeting)
    return link


def _connected(meeting: Meeting, device: torch.device, timeout: datetime.timedelta) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(meeting.store, meeting.rank, meeting.size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with torch.cuda.device(device):
        return dist.ProcessGroupNCCL(meeting.store, meeting.rank, meeting.size, options)


def _failures(notes: Mapping[int, str]) -> str:
    return "; ".join(f"rank {rank} failed: {note}" for rank, note in notes.items())


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8).reshape(-1) if rows.numel() else rows.new_empty(0, dtype=torch.uint8)


def _without_place(sentence: str) -> str:
    """A message of gloo's without the file that it comes from and the advice that follows."""
    return sentence.rpartition("] ")[2].split(". ")[0].rstrip(".") if sentence.startswith("[") else sentence.rstrip(".")
