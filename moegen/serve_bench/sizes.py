"""How long prompts and outputs are: distributions of token counts that are written as short texts.

    128                        always 128
    16-512                     uniform over 16, 17, ... 512
    lognormal:200,0.8          median 200, standard deviation 0.8 of the natural logarithm
    lognormal:200,0.8,16-4096  the same, drawn again outside 16 to 4096
    32*3,128*1                 32 three times as often as 128; without weights, all equally often

Sizes are whole numbers of tokens, 1 at least.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from ..errors import MeasureError

MOST_TOKENS = 1 << 20
_RANGE = re.compile(r"(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:([^,]+),([^,]+)(?:,(\d+)-(\d+))?")
_ITEM = re.compile(r"(\d+)(?:\*([^*]+))?")
_FORMS = "a number (128), a range (16-512), lognormal:MEDIAN,SIGMA[,LEAST-MOST], or sizes with weights (32*3,128*1)"
_DRAWS = 1000  # of a size within its range, before the range counts as out of reach


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A distribution of token counts.

    Args:
        text: as it was written.
        values: the sizes that may be drawn, each with its weight; empty for a lognormal or a range.
        weights: of the values, their sum is 1.
        least, most: the ends of a range, or of what a lognormal may give.
        median, sigma: of a lognormal; sigma 0 for none.
    """

    text: str
    values: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    least: int = 1
    most: int = MOST_TOKENS
    median: float = 0.0
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """One size.

        Raises:
            MeasureError: a lognormal hardly ever falls into its range.
        """
        if self.values:
            return int(rng.choice(self.values, p=self.weights))
        if not self.median:
            return int(rng.integers(self.least, self.most, endpoint=True))
        for _ in range(_DRAWS):
            found = self.median * math.exp(min(self.sigma * rng.standard_normal(), 700.0))
            if self.least - 0.5 <= found < self.most + 0.5:
                return round(found)
        raise MeasureError(f"size {self.text!r} hardly ever falls into {self.least} to {self.most}: widen the range")

    def __str__(self) -> str:
        return self.text


def parse(name: str, text: str) -> Sizes:
    """The distribution that `text` describes.

    Args:
        name: what messages call it.

    Raises:
        MeasureError: it is none, or a size is out of range.
    """
    plain = "".join(text.split())
    if found := _RANGE.fullmatch(plain):
        least, most = _size(name, found[1]), _size(name, found[2])
        if least > most:
            raise MeasureError(f"{name}={text!r} is an empty range: the smaller size comes first")
        return Sizes(plain, least=least, most=most)
    if found := _LOGNORMAL.fullmatch(plain):
        return _lognormal(name, plain, found)
    items = [_ITEM.fullmatch(part) for part in plain.split(",")]
    if not all(items):
        raise MeasureError(f"{name}={text!r} must be {_FORMS}")
    values = tuple(_size(name, item[1]) for item in items if item)
    weights = [1.0 if item[2] is None else _number(name, text, item[2]) for item in items if item]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise MeasureError(f"{name}={text!r} has a weight that is negative, or only zeros: give positive ones")
    return Sizes(plain, values, tuple(weight / sum(weights) for weight in weights))


def _lognormal(name: str, text: str, found: re.Match[str]) -> Sizes:
    median, sigma = _number(name, text, found[1]), _number(name, text, found[2])
    if not (1 <= median <= MOST_TOKENS and 0 < sigma <= 10):
        raise MeasureError(f"{name}={text!r} must have a median of 1 to {MOST_TOKENS} and a sigma above 0, 10 at most")
    least, most = (_size(name, found[3]), _size(name, found[4])) if found[3] else (1, MOST_TOKENS)
    if least > most:
        raise MeasureError(f"{name}={text!r} has an empty range: the smaller size comes first")
    return Sizes(text, least=least, most=most, median=median, sigma=sigma)


def _size(name: str, digits: str) -> int:
    if not 1 <= int(digits[:20]) <= MOST_TOKENS:
        raise MeasureError(f"{name}={digits[:20]} tokens must be between 1 and {MOST_TOKENS}")
    return int(digits)


def _number(name: str, text: str, digits: str) -> float:
    try:
        value = float(digits)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MeasureError(f"{name}={text!r}: {digits!r} is not a number; it must be {_FORMS}")
    return value
