"""Sizes of a layer on CUDA devices: products with natural, zero-padded weights, and where they lie in the packed blob.

Every product is `rows [*, k] @ weight [count, parts, n, k].T` with k contiguous: what tensor cores, wide copies and any other
reader of a checkpoint take. Gate and up are the two `parts` of one product, so that the activation happens in registers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .config import MoEConfig
from .geometry import ITEM_BYTES, Segment

K_MULTIPLE = 64  # terms of a dot product are padded to this
N_MULTIPLE = 64  # and columns to this: the widest tile of a product, or its halves
ROUTER_LANES = 32  # most threads that share a logit's dot product where a token's logits are made by one thread block
COPY_BYTES = 16  # of the widest copy
ALIGNMENT_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Product:
    """One `rows [*, k] @ weight [count, parts, n, k].T`.

    Args:
        count: experts.
        parts: 2 where gate and up are one product, otherwise 1.
        k: length of the dot product.
        n: output columns of each part.
        dtype: of rows and weight.
    """

    count: int
    parts: int
    k: int
    n: int
    dtype: str

    @property
    def k_padded(self) -> int:
        """Stored length of the dot product."""
        return _round_up(self.k, K_MULTIPLE)

    @property
    def n_padded(self) -> int:
        """Stored columns of each part."""
        return _round_up(self.n, N_MULTIPLE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the packed weight."""
        return (self.count, self.parts, self.n_padded, self.k_padded)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Of the packed bias."""
        return self.shape[:3]


@dataclasses.dataclass(frozen=True)
class CudaGeometry:
    """All products of a layer and where their weights lie."""

    config: MoEConfig

    @property
    def router(self) -> Product:
        """Logits of all experts; the shared expert's gate is one more column."""
        c = self.config
        return Product(1, 1, c.hidden, c.experts + int(c.shared_gate), c.dtype)

    @property
    def up(self) -> Product:
        """Gate and up projection of the routed experts."""
        return self._up(self.config.experts, self.config.intermediate)

    @property
    def down(self) -> Product:
        """Down projection of the routed experts."""
        return self._down(self.up)

    @property
    def shared_up(self) -> Product:
        """Gate and up projection of the shared expert."""
        return self._up(1, self.config.shared_intermediate)

    @property
    def shared_down(self) -> Product:
        """Down projection of the shared expert."""
        return self._down(self.shared_up)

    @property
    def ffns(self) -> tuple[tuple[str, Product, Product], ...]:
        """(prefix of its segments, gate and up projection, down projection) of the routed experts and of the shared one."""
        routed = ("", self.up, self.down)
        return (routed, ("shared_", self.shared_up, self.shared_down)) if self.config.shared_intermediate else (routed,)

    def _up(self, count: int, intermediate: int) -> Product:
        c = self.config
        return Product(count, 2 if c.gated else 1, c.hidden, intermediate, c.dtype)

    def _down(self, up: Product) -> Product:
        return Product(up.count, 1, up.n, self.config.hidden, up.dtype)

    @property
    def products(self) -> dict[str, Product]:
        """Every product by the name of its segment."""
        found = {"router": self.router}
        for prefix, up, down in self.ffns:
            found |= {f"{prefix}up": up, f"{prefix}down": down}
        return found

    @property
    def router_terms(self) -> int:
        """Terms that the router goes through for few tokens, zeros at the end: as many for each of `ROUTER_LANES` or fewer."""
        whole = ROUTER_LANES * COPY_BYTES // self.item_bytes
        k = self.router.k_padded
        return _round_up(k, whole) if k > whole else 1 << (k - 1).bit_length()

    @property
    def token_copy(self) -> int:
        """Elements of a token that are read at once where tokens are read as they were given."""
        return math.gcd(self.config.hidden, COPY_BYTES // self.item_bytes)

    @property
    def terms_type(self) -> str:
        """Of what `down` writes for each choice and `combine` adds up: bfloat16 has float32's range, float16 has not."""
        return "bfloat16" if self.config.dtype == "bfloat16" else "float32"

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The packed weight blob, in order."""
        placed, offset = [], 0
        for name, dtype, shape in self._segment_shapes():
            segment = Segment(name, dtype, shape, offset)
            placed.append(segment)
            offset = _round_up(offset + segment.size_bytes, ALIGNMENT_BYTES)
        return tuple(placed)

    def _segment_shapes(self) -> list[tuple[str, str, tuple[int, ...]]]:
        c = self.config
        shapes: list[tuple[str, str, tuple[int, ...]]] = [(name, p.dtype, p.shape) for name, p in self.products.items()]
        if c.router_bias:
            shapes.append(("router_bias", "float32", self.router.bias_shape))
        if c.correction_bias:
            shapes.append(("correction_bias", "float32", (c.experts,)))
        if c.expert_bias:
            shapes += [("up_bias", "float32", self.up.bias_shape), ("down_bias", "float32", self.down.bias_shape)]
        return shapes

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weight blob."""
        last = self.segments[-1]
        return _round_up(last.offset_bytes + last.size_bytes, ALIGNMENT_BYTES)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of the layer's type."""
        return ITEM_BYTES[self.config.dtype]

    def describe(self) -> list[dict[str, Any]]:
        """The weight layout as plain JSON values."""
        return [dataclasses.asdict(s) | {"shape": list(s.shape), "size_bytes": s.size_bytes} for s in self.segments]


def _round_up(a: int, b: int) -> int:
    return -(-a // b) * b
