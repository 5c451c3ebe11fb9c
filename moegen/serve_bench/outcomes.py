"""What became of a request, in seconds after the start of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

OK, FAILED, UNFINISHED = "ok", "failed", "unfinished"


@dataclasses.dataclass
class Outcome:
    """A request from when it was to come to its end.

    Args:
        index: its place in the run.
        due_s: when it was to come: as scheduled in an open loop, when it was sent in a closed one. Every latency counts from here.
        prompt_tokens: tokens that it brought.
        asked_tokens: tokens that it asked for.
        started_s: when it was sent to the server, or when the layer first took tokens of it.
        token_s: when each token came; of a server, each piece of its stream that carried some.
        ended_s: when all was there, or the failure.
        output_tokens: tokens that came.
        status: `ok`, `failed` or `unfinished`.
        kind: which failure, in a word or two that failures are counted by.
        error: the failure in a sentence.
    """

    index: int
    due_s: float
    prompt_tokens: int
    asked_tokens: int
    started_s: float | None = None
    token_s: list[float] = dataclasses.field(default_factory=list)
    ended_s: float | None = None
    output_tokens: int = 0
    status: str = UNFINISHED
    kind: str = ""
    error: str = ""

    def fail(self, kind: str, error: str, now_s: float) -> None:
        """The request ends without all of its answer."""
        self.status, self.kind, self.error, self.ended_s = FAILED, kind, error, now_s

    def succeed(self, now_s: float) -> None:
        """All of the answer is there."""
        self.status, self.ended_s = OK, now_s

    # ---------------------------------------------------------------- seconds of a request that succeeded

    @property
    def wait_s(self) -> float:
        """From when it was due to when it was sent, or to the layer's first step with it."""
        assert self.started_s is not None
        return self.started_s - self.due_s

    @property
    def first_token_s(self) -> float:
        """Time to first token (TTFT)."""
        return self.token_s[0] - self.due_s

    @property
    def latency_s(self) -> float:
        """From when it was due to its end."""
        assert self.ended_s is not None
        return self.ended_s - self.due_s

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first (TPOT); None for one token."""
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def gaps_s(self) -> list[float]:
        """Times between tokens that came one after the other (inter-token latency)."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_dict` described."""
        return cls(**values)


@dataclasses.dataclass
class Played:
    """One run of a load against one target.

    Args:
        outcomes: of all requests that were due, in order.
        seconds: from the start to the end of the last request.
        interrupted: whether it was cut short.
        facts: what else the target has to say, as JSON values.
    """

    outcomes: Sequence[Outcome]
    seconds: float
    interrupted: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
