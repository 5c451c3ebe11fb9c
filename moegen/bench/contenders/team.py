"""The worker processes of one run, as contenders by name: a crash or a hang costs one contender, not its family."""

from __future__ import annotations

import dataclasses
from typing import Any

from .family import Settings
from .process import Process, WorkerLost
from .roster import FAMILIES


@dataclasses.dataclass
class _Member:
    """A family, its process while it has one, and the names that were asked for."""

    family: str
    names: list[str]
    process: Process | None = None


class Team:
    """Every contender that can run a layer, ready to be asked; a context manager.

    Args:
        families: family -> contenders, as `chosen_families` gives them.
        settings: what the workers are told.
        patience_seconds: how long an answer may take before the contender counts as hung.

    Attributes:
        names: the contenders that can run, in order.
        absent: the others, each with the reason.
        lost: contenders that crashed or hung, each with the reason.
        facts: family -> what it reported when it started.
    """

    def __init__(self, families: dict[str, list[str]], settings: Settings, patience_seconds: float) -> None:
        self.settings, self.patience_seconds = settings, patience_seconds
        self.names: list[str] = []
        self.absent: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._members: dict[str, _Member] = {}
        self._of: dict[str, _Member] = {}
        self._tokens: int | None = None
        try:
            for family, names in families.items():
                self._enlist(_Member(family, names))
        except BaseException:
            self.close()
            raise

    def _enlist(self, member: _Member) -> None:
        try:
            reason = FAMILIES[member.family].missing()
            hello = {} if reason else self._start(member)
            reason = reason or hello.get("error", "")
        except WorkerLost as loss:
            hello, reason = {}, str(loss)
        if reason:
            if member.process is not None:
                member.process.close()
            self.absent |= dict.fromkeys(member.names, reason)
            return
        self.facts[member.family] = hello["facts"]
        self._members[member.family] = member
        for name in [*member.names, *hello["calls"]]:
            self._of[name] = member
        self.names += [name for name in member.names if name in hello["calls"]]
        self.absent |= {name: why for name, why in hello["obstacles"].items() if name in member.names}

    def _start(self, member: _Member) -> dict[str, Any]:
        member.process = Process(member.family, self.settings, self.patience_seconds)
        return member.process.hello

    def point(self, tokens: int) -> dict[str, int | None]:
        """Tells all workers which batches come next; returns each family's bytes of workspace, where it says."""
        self._tokens = tokens
        replies = {}
        for family, member in self._members.items():
            if member.process is not None:
                try:
                    replies[family] = reply = member.process.ask("point", tokens=tokens)
                    if "error" in reply:
                        raise WorkerLost(reply["error"])
                except WorkerLost as loss:
                    self._lose(member, member.names, f"{loss} (when it was given {tokens} tokens)")
        return {family: reply.get("workspace_bytes") for family, reply in replies.items()}

    def ask(self, name: str, request: str, **arguments: Any) -> dict[str, Any]:
        """Asks one contender; {"error": reason} when its library raised, or it crashed or hung, now or before."""
        if name in self.lost:
            return {"error": self.lost[name]}
        member = self._of[name]
        try:
            if member.process is None:
                self._restart(member)
            assert member.process is not None
            return member.process.ask(request, name=name, **arguments)
        except WorkerLost as loss:
            self._lose(member, [name], str(loss))
            return {"error": str(loss)}

    def _restart(self, member: _Member) -> None:
        """A new process for what is left of a family."""
        hello = self._start(member)
        if "error" in hello:
            raise WorkerLost(hello["error"])
        assert member.process is not None
        reply = {} if self._tokens is None else member.process.ask("point", tokens=self._tokens)
        if "error" in reply:
            raise WorkerLost(reply["error"])

    def _lose(self, member: _Member, names: list[str], reason: str) -> None:
        self.lost |= dict.fromkeys(names, reason)
        if member.process is not None:
            member.process.close()
        member.process = None

    def close(self) -> None:
        """Ends all processes."""
        for member in self._members.values():
            if member.process is not None:
                member.process.close()
                member.process = None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
