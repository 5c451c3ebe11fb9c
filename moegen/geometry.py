"""Sizes that follow from a configuration and a tiling: register tiles, weight panels and the packed weight blob.

Every product of the layer (router, gate/up, down) is `rows @ weight.T` computed in *panels*: a panel is a group of output
columns held in two vector registers per row, stored so that the kernel reads it as one sequential stream. In gated experts
the two vectors of a panel are the same columns of gate and up, so that the activation happens in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .config import MoEConfig

VECTORS = 2
ROW_CHUNK = 16
ROUTER_K_BLOCK = 32  # short sums: a logit's rounding error decides near ties and is multiplied by exp()
ALIGNMENT_BYTES = 64
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "uint32": 4, "uint16": 2, "int8": 1, "uint8": 1}
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "mxfp4": 4}
BYTES = 4  # terms in a 32-bit lane where rows and weights are bytes
NIBBLES = 8  # consecutive terms whose 4-bit codes lie together, in one 32-bit lane or in the two 16-bit halves of one


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the products are tiled; decides the weight layout, so it is a part of the artifact.

    Args:
        lanes: float32 lanes of a vector register.
        max_rows: largest register tile; a tile kernel exists for each row count 1..max_rows.
        chunk_rows: most rows that are gathered and taken through both products before the next ones.
        k_block: longest run of a dot product kept in one accumulator; block sums are added up (accuracy and cache).
        pair: consecutive terms of a dot product that one instruction takes: 2 where rows and weights stay bfloat16
            (`vdpbf16ps`), 1 where they are multiplied as float32.
        byte_dot: rows of bytes are multiplied four terms at a time (`vpdpbusd`).
    """

    lanes: int
    max_rows: int
    chunk_rows: int
    k_block: int
    pair: int = 1
    byte_dot: bool = False

    @property
    def row_tiles(self) -> range:
        """The row counts that tile kernels are generated for."""
        return range(1, self.max_rows + 1)


@dataclasses.dataclass(frozen=True)
class Regime:
    """How the rows of one expert are cut, by their number as counted in the call; a layer has a table of these.

    Args:
        rows_up_to: most rows that this holds for; None in the last line of a table.
        tile_rows: largest register tile used.
        pass_rows: most rows that stream the expert's weights once.
        tasks_per_thread: most tasks for each thread that a product is divided into, where an expert has so many rows in the mean.
    """

    rows_up_to: int | None
    tile_rows: int
    pass_rows: int
    tasks_per_thread: int = 4


@dataclasses.dataclass(frozen=True)
class Product:
    """One `rows [*, k] @ weight [n, k].T` in panels.

    `rows` is stored `[block, k_chunks, row, k_chunk]`, the weight `[count, panels, k_chunks * k_chunk, 2, lanes]`, zero-padded;
    with pairs `[count, panels, k_chunks * k_chunk / 2, 2, lanes, 2]`, so that both terms of a pair lie in one 32-bit lane.
    Four bits a term: `[count, panels, k_chunks * k_chunk / 8, 2, lanes]` in words of 32 bits, term k in bits 4 * (k % 8) and
    the following three; with pairs `[..., 2, lanes, 2]` in words of 16 bits, term k in word k % 2 from bit 4 * (k // 2 % 4) on.

    Args:
        weight_dtype: a float type, or how codes are stored: `int8`, `int4`, `mxfp4`.
        group: terms that share a scale: one block of the dot product, or 0 for all of them.
        byte_dot: as in `Tiling`.
    """

    count: int
    k: int
    k_chunk: int
    k_chunks: int
    k_blocks: int
    n: int
    panels: int
    lanes: int
    gated: bool
    pair: int
    weight_dtype: str
    group: int = 0
    byte_dot: bool = False

    @property
    def columns(self) -> int:
        """Output columns of one panel."""
        return self.lanes if self.gated else VECTORS * self.lanes

    @property
    def k_padded(self) -> int:
        """Length of the stored dot product."""
        return self.k_chunks * self.k_chunk

    @property
    def n_padded(self) -> int:
        """Stored output columns."""
        return self.panels * self.columns

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return BITS[self.weight_dtype]

    @property
    def low_bit(self) -> bool:
        """Whether the weight is codes, with scales."""
        return self.bits < 16

    @property
    def groups(self) -> int:
        """Scales of one output column."""
        return self.k_blocks if self.group else 1

    @property
    def word_dtype(self) -> str:
        """Type of the stored weight's elements, each of which is several codes where they have four bits."""
        if self.bits > 4:
            return self.weight_dtype
        return "uint32" if self.pair == 1 else "uint16"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        together = NIBBLES if self.bits == 4 else self.pair
        shape = (self.count, self.panels, self.k_padded // together, VECTORS, self.lanes)
        return shape if self.pair == 1 else (*shape, self.pair)

    @property
    def steps_per_chunk(self) -> int:
        """Steps along a row chunk: a term each, as many as an instruction takes, or those whose codes lie in one word."""
        return self.k_chunk // (NIBBLES if self.bits == 4 and self.pair == 2 else self.pair)

    @property
    def row_dtype(self) -> str:
        """Type of the stored rows."""
        return {1: "float32", 2: "bfloat16", 4: "uint8"}[self.pair]

    @property
    def lines_per_chunk(self) -> int:
        """Cache lines of weights that belong to one row chunk of one panel; 0 where one line has several."""
        return self.k_chunk * VECTORS * self.lanes * self.bits // 8 // ALIGNMENT_BYTES

    @property
    def panel_bytes(self) -> int:
        """Bytes of the weights of one panel."""
        return self.k_padded * VECTORS * self.lanes * self.bits // 8

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the packed bias."""
        return (self.count, self.panels, VECTORS, self.lanes)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the packed scales, and of the zero points."""
        return (self.count, self.panels, self.groups, VECTORS, self.lanes)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        """Shape of what the offset of rows of bytes adds to the sums, block by block."""
        return (self.count, self.panels, self.k_blocks, VECTORS, self.lanes)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One array inside the packed weight blob."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the array occupies."""
        size = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


@dataclasses.dataclass(frozen=True)
class Geometry:
    """All products of a layer and where their weights lie."""

    config: MoEConfig
    tiling: Tiling

    @property
    def router(self) -> Product:
        """Logits of all experts; the shared expert's gate is one more column."""
        c, t = self.config, self.tiling
        n = c.experts + int(c.shared_gate)
        chunks = self.up.k_chunks  # rows are gathered alike for both products
        blocks = next(b for b in range(1, chunks + 1) if chunks % b == 0 and chunks // b * ROW_CHUNK <= ROUTER_K_BLOCK)
        panels = _ceil_div(n, VECTORS * t.lanes)
        dtype = "float32" if t.pair == 1 else "bfloat16"
        return Product(1, c.hidden, ROW_CHUNK, chunks, blocks, n, panels, t.lanes, False, t.pair, dtype)

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
        """Its rows are gathered from the layer's input in chunks of `ROW_CHUNK`."""
        c, lanes = self.config, self.tiling.lanes
        k_chunks, k_blocks = self._blocked(_ceil_div(c.hidden, ROW_CHUNK), ROW_CHUNK)
        columns = lanes * (1 if c.gated else VECTORS)
        panels, _ = self._blocked(_ceil_div(intermediate, columns), columns)
        sizes = (count, c.hidden, ROW_CHUNK, k_chunks, k_blocks, intermediate, panels, lanes)
        return Product(*sizes, c.gated, **self._stored)

    def _down(self, up: Product) -> Product:
        """Its rows are the panels that `up` wrote."""
        c, lanes = self.config, self.tiling.lanes
        k_chunks, k_blocks = self._blocked(up.panels, up.columns)
        panels = _ceil_div(c.hidden, VECTORS * lanes)
        sizes = (up.count, up.n, up.columns, k_chunks, k_blocks, c.hidden, panels, lanes)
        return Product(*sizes, False, **self._stored)

    @property
    def _stored(self) -> dict[str, Any]:
        """How the experts' rows and weights are stored."""
        c, t = self.config, self.tiling
        weight_dtype = c.weight_dtype if c.low_bit else c.dtype
        pair = t.pair if c.activation_dtype == "same" else BYTES
        return {"pair": pair, "weight_dtype": weight_dtype, "group": c.weight_group, "byte_dot": t.byte_dot}

    def _blocked(self, chunks: int, chunk: int) -> tuple[int, int]:
        """(chunks rounded up so that the blocks are equal, number of blocks); a group of weights that share a scale is a block."""
        if group := self.config.weight_group:
            blocks = _ceil_div(chunks * chunk, group)
            return blocks * group // chunk, blocks
        blocks = max(1, _ceil_div(chunks * chunk, self.tiling.k_block))
        return _round_up(chunks, blocks), blocks

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The packed weight blob, in order; every segment starts on a cache line."""
        placed, offset = [], 0
        for name, dtype, shape in self._segment_shapes():
            segment = Segment(name, dtype, shape, offset)
            placed.append(segment)
            offset = _round_up(offset + segment.size_bytes, ALIGNMENT_BYTES)
        return tuple(placed)

    def _segment_shapes(self) -> list[tuple[str, str, tuple[int, ...]]]:
        c = self.config
        shapes: list[tuple[str, str, tuple[int, ...]]] = [("router", self.router.row_dtype, self.router.weight_shape)]
        if c.router_bias:
            shapes.append(("router_bias", "float32", self.router.bias_shape))
        if c.correction_bias:
            shapes.append(("correction_bias", "float32", (c.experts,)))
        for prefix, up, down in self.ffns:
            for name, product in ((f"{prefix}up", up), (f"{prefix}down", down)):
                shapes.append((name, product.word_dtype, product.weight_shape))
                shapes += self._scales(name, product)
        if c.expert_bias:
            shapes += [("up_bias", "float32", self.up.bias_shape), ("down_bias", "float32", self.down.bias_shape)]
        return shapes

    def _scales(self, name: str, product: Product) -> list[tuple[str, str, tuple[int, ...]]]:
        """What goes with codes: scales, zero points, and for rows of bytes what their offset adds to each sum."""
        c = self.config
        if not product.low_bit:
            return []
        found = [(f"{name}_scale", "uint8" if c.weight_dtype == "mxfp4" else c.scale_dtype, product.scale_shape)]
        if c.weight_zero_point:
            found.append((f"{name}_zero", "int8", product.scale_shape))
        if product.pair == BYTES:
            found.append((f"{name}_offset", "int32", product.offset_shape))
        return found

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weight blob."""
        last = self.segments[-1]
        return _round_up(last.offset_bytes + last.size_bytes, ALIGNMENT_BYTES)

    def describe(self) -> list[dict[str, Any]]:
        """The weight layout as plain JSON values."""
        return [dataclasses.asdict(s) | {"shape": list(s.shape), "size_bytes": s.size_bytes} for s in self.segments]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b
