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
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    """

    lanes: int
    max_rows: int
    chunk_rows: int
    k_block: int
    pair: int = 1

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
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        shape = (self.count, self.panels, self.k_padded // self.pair, VECTORS, self.lanes)
        return shape if self.pair == 1 else (*shape, self.pair)

    @property
    def row_dtype(self) -> str:
        """Type of the stored rows."""
        return "float32" if self.pair == 1 else "bfloat16"

    def lines_per_chunk(self, dtype: str) -> int:
        """Cache lines of weights that belong to one row chunk of one panel."""
        return self.k_chunk * VECTORS * self.lanes * ITEM_BYTES[dtype] // ALIGNMENT_BYTES

    def panel_bytes(self, dtype: str) -> int:
        """Bytes of the weights of one panel."""
        return self.k_padded * VECTORS * self.lanes * ITEM_BYTES[dtype]

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the packed bias."""
        return (self.count, self.panels, VECTORS, self.lanes)


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
        c, lanes = self.config, self.tiling.lanes
        n = c.experts + int(c.shared_gate)
        chunks = self.up.k_chunks  # the same gathered rows feed both products
        blocks = next(b for b in range(1, chunks + 1) if chunks % b == 0 and chunks // b * ROW_CHUNK <= ROUTER_K_BLOCK)
        return Product(1, c.hidden, ROW_CHUNK, chunks, blocks, n, _ceil_div(n, VECTORS * lanes), lanes, False, self.tiling.pair)

    @property
    def up(self) -> Product:
        """Gate and up projection of the routed experts."""
        return self._up(self.config.experts, self.config.intermediate)

    @property
    def down(self) -> Product:
        """Down projection of the routed experts."""
        return _second(self.up, self.config.hidden, self.tiling)

    @property
    def shared_up(self) -> Product:
        """Gate and up projection of the shared expert."""
        return self._up(1, self.config.shared_intermediate)

    @property
    def shared_down(self) -> Product:
        """Down projection of the shared expert."""
        return _second(self.shared_up, self.config.hidden, self.tiling)

    def _up(self, count: int, intermediate: int) -> Product:
        return _first(count, self.config.hidden, intermediate, self.config.gated, self.tiling)

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
        shapes += [("up", c.dtype, self.up.weight_shape), ("down", c.dtype, self.down.weight_shape)]
        if c.expert_bias:
            shapes += [("up_bias", "float32", self.up.bias_shape), ("down_bias", "float32", self.down.bias_shape)]
        if c.shared_intermediate:
            shapes += [("shared_up", c.dtype, self.shared_up.weight_shape), ("shared_down", c.dtype, self.shared_down.weight_shape)]
        return shapes

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weight blob."""
        last = self.segments[-1]
        return _round_up(last.offset_bytes + last.size_bytes, ALIGNMENT_BYTES)

    def describe(self) -> list[dict[str, Any]]:
        """The weight layout as plain JSON values."""
        return [dataclasses.asdict(s) | {"shape": list(s.shape), "size_bytes": s.size_bytes} for s in self.segments]


def _first(count: int, k: int, n: int, gated: bool, tiling: Tiling) -> Product:
    """A product whose rows are gathered from the layer's input in chunks of `ROW_CHUNK`."""
    k_chunks, k_blocks = _blocked(_ceil_div(k, ROW_CHUNK), ROW_CHUNK, tiling)
    columns = tiling.lanes * (1 if gated else VECTORS)
    panels, _ = _blocked(_ceil_div(n, columns), columns, tiling)
    return Product(count, k, ROW_CHUNK, k_chunks, k_blocks, n, panels, tiling.lanes, gated, tiling.pair)


def _second(up: Product, n: int, tiling: Tiling) -> Product:
    """A product whose rows are the panels that `up` wrote."""
    k_chunks, k_blocks = _blocked(up.panels, up.columns, tiling)
    panels = _ceil_div(n, VECTORS * tiling.lanes)
    return Product(up.count, up.n, up.columns, k_chunks, k_blocks, n, panels, tiling.lanes, False, tiling.pair)


def _blocked(chunks: int, chunk: int, tiling: Tiling) -> tuple[int, int]:
    """(chunks rounded up so that the blocks are equal, number of blocks)."""
    blocks = max(1, _ceil_div(chunks * chunk, tiling.k_block))
    return _round_up(chunks, blocks), blocks


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b
