"""What the expert path should take on an H200 in bfloat16: the roofline, today's best elsewhere, and what moegen aims at.

Derived, not measured: bytes of the active experts' weights at 4.3 TB/s and operations at 790 TFLOP/s, uniform routing, and what
published kernels reach of that. Ratios within one run say more than these.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """Seconds for the sort, both products, the activation and the combination, routing given."""

    roofline: float
    match: float
    ours: float


def _us(*values: float) -> Target:
    return Target(*(value * 1e-6 for value in values))


def _ms(*values: float) -> Target:
    return Target(*(value * 1e-3 for value in values))


TOKENS = (1, 16, 64, 1024, 4096, 16384)
_ROWS: dict[str, tuple[Target, ...]] = {
    "mixtral": (
        _us(164, 195, 175), _us(649, 700, 670), _us(657, 705, 675),
        _ms(0.91, 1.44, 1.20), _ms(3.65, 4.8, 4.25), _ms(14.6, 17.8, 16.5),
    ),
    "qwen3-30b-a3b": (
        _us(18, 40, 28), _us(181, 210, 190), _us(277, 305, 288),
        _us(289, 400, 340), _us(391, 885, 620), _ms(1.57, 2.47, 2.2),
    ),
    "deepseek-v3": (
        _us(164, 195, 175), _us(2089, 2250, 2150), _us(4558, 4850, 4650),
        _ms(5.27, 5.7, 5.45), _ms(5.33, 8.4, 6.7), _ms(14.6, 22.2, 19.2),
    ),
    "gpt-oss-20b": (
        _us(46, 60, 52), _us(327, 365, 340), _us(371, 410, 385),
        _us(384, 600, 480), _ms(1.03, 1.70, 1.43), _ms(4.13, 5.9, 5.3),
    ),
    "olmoe": (
        _us(23, 35, 28), _us(165, 190, 175), _us(188, 215, 198),
        _us(197, 305, 240), _us(522, 1030, 790), _ms(2.09, 3.2, 2.75),
    ),
}  # fmt: skip
TARGETS = {layer: dict(zip(TOKENS, row, strict=True)) for layer, row in _ROWS.items()}


def target(layer: str, tokens: int) -> Target | None:
    """The target of a preset for T=`tokens`; None where none was set."""
    return TARGETS.get(layer, {}).get(tokens)
