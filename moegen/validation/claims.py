"""What is claimed, with every threshold, before anything is measured. This file is the only place that has them.

A claim is about one layer. It is judged by one number: `pass` when the number is on the right side of the limit, `fail` when it
is not, `not tested` when there is no number, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench.request import Subject
from ..display import number
from ..verification import bounds

PASS, FAIL, NOT_TESTED = "pass", "fail", "not tested"

BUILD_SECONDS = 60.0
LOAD_SECONDS = 0.1
FIRST_CALL_SECONDS = 0.1
LEAST_RATIO = 1.0
LEAST_OF_ROOFLINE = 0.5
CONFIDENCE = 0.95
# A round counts when neither contender waited longer for a processor that other processes had, as a share of its turn.
QUIET_SHARE = 0.1

AT_MOST, AT_LEAST, ABOVE = "at most", "at least", "above"
_HOLDS = {
    AT_MOST: lambda value, limit: value <= limit,
    AT_LEAST: lambda value, limit: value >= limit,
    ABOVE: lambda value, limit: value > limit,
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim about one layer.

    Args:
        layer: the layer's label.
        name: what findings call it.
        says: what is claimed, in words.
        side: on which side of the limit the number has to be: `at most`, `at least`, `above`.
        limit: the threshold.
        unit: of the number; nothing for ratios.
    """

    layer: str
    name: str
    says: str
    side: str
    limit: float
    unit: str = ""

    @property
    def threshold(self) -> str:
        """The limit in words: "at most 60 s"."""
        digits = f"{self.limit:g}" if self.limit == 0 or abs(self.limit) >= 1e-3 else f"{self.limit:.0e}"
        return f"{self.side} {digits}{f' {self.unit}' if self.unit else ''}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found out for a claim.

    Args:
        value: the number that decides; None when there is none. Infinite for what failed altogether.
        words: what was measured, or why there is no number.
        disturbed: what else went on; then a number beyond the limit is no failure, and nothing was tested.
    """

    value: float | None
    words: str
    disturbed: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and how it ended: `pass`, `fail` or `not tested`, with what was measured or why it was not."""

    claim: Claim
    status: str
    value: float | None
    words: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        return {
            **dataclasses.asdict(self.claim),
            "threshold": self.claim.threshold,
            "status": self.status,
            "value": value,
            "words": self.words,
        }


def claims(subjects: Sequence[Subject], tokens: Sequence[int]) -> list[Claim]:
    """Every claim about the layers, and about calls with so many tokens."""
    return [claim for subject in subjects for claim in _claims(subject, tokens)]


def _claims(subject: Subject, tokens: Sequence[int]) -> Iterator[Claim]:
    layer, (l2, elementwise) = subject.label, bounds(subject.config)
    yield Claim(layer, "build", "is built from its configuration", AT_MOST, BUILD_SECONDS, "s")
    yield Claim(layer, "relative_l2", "relative L2 error against float64, worst of all routings", AT_MOST, l2)
    yield Claim(layer, "elementwise", "error of an element, over its size and its token's rms", AT_MOST, elementwise)
    yield Claim(layer, "routing", "experts, weights, counts and losses are the reference's", AT_MOST, 0, "failures")
    yield Claim(layer, "threads", "bitwise the same with every number of threads", AT_MOST, 0, "values differ")
    yield Claim(layer, "callers", "bitwise the same when called from several threads at once", AT_MOST, 0, "values differ")
    yield Claim(layer, "batch", "a token's output does not depend on the rest of the batch", AT_MOST, 0, "values differ")
    yield Claim(layer, "nan", "NaN in a token makes its output NaN and touches no other", AT_MOST, 0, "values differ")
    yield Claim(layer, "empty", "no tokens give an empty output", AT_MOST, 0, "failures")
    yield Claim(layer, "alone", "runs in a process that can import no compiler", AT_MOST, 0, "failures")
    yield Claim(layer, "load", "is loaded in a new process, imports left out", AT_MOST, LOAD_SECONDS, "s")
    yield Claim(layer, "first_call", "answers its first call, one token, in a new process", AT_MOST, FIRST_CALL_SECONDS, "s")
    whole = f" (torch with {subject.config.dtype} weights)" if subject.config.low_bit else ""
    for count in tokens:
        yield Claim(layer, f"numpy_{count}", f"faster than NumPy at T={count}", ABOVE, LEAST_RATIO)
        yield Claim(layer, f"torch_{count}", f"faster than torch's best at T={count}{whole}", ABOVE, LEAST_RATIO)
        yield Claim(layer, f"roofline_{count}", f"share of the roofline at T={count}", AT_LEAST, LEAST_OF_ROOFLINE)


def judge(claim: Claim, findings: Mapping[str, Finding], missing: str) -> Verdict:
    """The verdict on a claim.

    Args:
        findings: those of the claim's layer, by the names of claims.
        missing: why there is no finding, where there is none.
    """
    found = findings.get(claim.name)
    if found is None or found.value is None:
        return Verdict(claim, NOT_TESTED, None, found.words if found is not None else missing)
    if math.isnan(found.value):
        return Verdict(claim, FAIL, None, found.words)
    holds = _HOLDS[claim.side](found.value, claim.limit)
    if found.disturbed and not holds:
        return Verdict(claim, NOT_TESTED, None, f"{found.words}, while {found.disturbed}")
    return Verdict(claim, PASS if holds else FAIL, found.value, found.words)


def counted(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """ "31 pass, 1 fail, 3 not tested"."""
    return ", ".join(f"{sum(v['status'] == status for v in verdicts)} {status}" for status in (PASS, FAIL, NOT_TESTED))


def shown(value: float, unit: str) -> str:
    """A number with its unit."""
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else number(value) if value % 1 else f"{value:g}"
    return f"{text} {unit}".strip()
