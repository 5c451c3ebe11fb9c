"""How uneven the work of experts is, in numbers; n_e are the choices of expert e, p_e their share.

* Entropy: H = -sum p_e log2 p_e, in bits (Shannon, 1948). Divided by log2 E it is Pielou's evenness (1966): 1 when all
  experts work alike, 0 when one does everything. 2^H is how many experts work, in effect.
* Imbalance: max n_e / mean n_e, 1 when all work alike and E when one does everything: what a device waits for that has as many
  experts as the others. One less is the MaxVio of Wang et al. (2024, arXiv:2408.15664).
* Coefficient of variation: standard deviation over mean, of the whole population of E experts; its square is the importance
  loss of Shazeer et al. (2017, arXiv:1701.06538), without their coefficient.
* Gini: sum (2 i - E - 1) n_(i) / (E sum n) over the counts in ascending order, i = 1 .. E (Gini, 1912, as Dixon et al. write
  it, 1987): 0 when all work alike, (E - 1) / E when one does everything.

Of no choices at all nothing can be said: these numbers are None then.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of one layer's experts, since the start or in the window.

    Args:
        layer: its label.
        experts: E.
        calls, tokens: how many came.
        choices: of experts, T * K; in the window the sum of weights.
        dropped: choices over capacity.
        invalid: choices of experts that there are not; only those of a CUDA device are counted, others are refused.
        entropy_bits, evenness, imbalance, variation, gini: see `moegen.monitoring.measures`; None before the first choice.
        dead: experts that nothing chose.
        busiest: the expert with the most choices; None before the first.
    """

    layer: str
    experts: int
    calls: int
    tokens: int
    choices: float
    dropped: int
    invalid: int
    entropy_bits: float | None
    evenness: float | None
    imbalance: float | None
    variation: float | None
    gini: float | None
    dead: tuple[int, ...]
    busiest: int | None


def entropy_bits(counts: Counts) -> float | None:
    """Of counts [E], in bits."""
    total = counts.sum()
    if not total > 0:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # and never -0.0


def evenness(counts: Counts) -> float | None:
    """The entropy of counts [E] as a share of the largest possible; 1 for a single expert."""
    bits = entropy_bits(counts)
    return bits if bits is None else 1.0 if len(counts) == 1 else min(bits / float(np.log2(len(counts))), 1.0)


def imbalance(counts: Counts) -> float | None:
    """The largest of counts [E] over their mean."""
    total = counts.sum()
    return float(counts.max() * len(counts) / total) if total > 0 else None


def variation(counts: Counts) -> float | None:
    """The standard deviation of counts [E] over their mean."""
    return float(counts.std() / counts.mean()) if counts.sum() > 0 else None


def gini(counts: Counts) -> float | None:
    """Of counts [E]."""
    total, experts = counts.sum(), len(counts)
    if not total > 0:
        return None
    places = 2.0 * np.arange(1, experts + 1) - experts - 1
    return float((places * np.sort(counts)).sum() / (experts * total)) + 0.0
