"""The fused MoE baseline in Triton, with the fastest of a handful of tiles for each size, found by measuring in the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..errors import MeasureError
from . import fused_kernels as kernels
from .material import Batch, Weights
from .torch_experts import Call

_BLOCK = 1024
_PLACED = 32
_ALONE = 4  # so many experts for each choice and more: sorting would find no two rows of one expert


@dataclasses.dataclass(frozen=True)
class Tile:
    """M rows times N columns, K terms at a time; so many row blocks walk the columns together; warps; stages of the pipeline."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


TILES = (
    Tile(16, 64, 128, 1, 4, 4),
    Tile(16, 128, 64, 1, 4, 5),
    Tile(32, 64, 128, 1, 4, 4),
    Tile(32, 128, 64, 1, 4, 4),
    Tile(64, 128, 64, 1, 4, 4),
    Tile(64, 256, 64, 8, 8, 4),
    Tile(128, 128, 64, 16, 8, 4),
    Tile(128, 256, 64, 16, 8, 3),
    Tile(128, 256, 64, 8, 8, 4),
)


def tiles_for(rows_per_expert: float) -> tuple[Tile, ...]:
    """Those worth trying where an expert has so many rows in the mean."""
    if rows_per_expert <= 8:
        return tuple(tile for tile in TILES if tile.m == 16)
    if rows_per_expert <= 48:
        return tuple(tile for tile in TILES if tile.m <= 64 and tile.n <= 128)
    return tuple(tile for tile in TILES if tile.m >= 64)


class Fused:
    """Sort, product, activation, product with the routing weights, sum: seven launches, four where nothing is sorted.

    Args:
        tile: of both products; `prepare` uses it for every batch.

    Raises:
        MeasureError: another activation than SwiGLU's two.
    """

    name = "triton-fused"

    def __init__(self, weights: Weights, tile: Tile = TILES[0]) -> None:
        if weights.config.activation not in ("swiglu", "swiglu_clamped"):
            raise MeasureError(f"the Triton baseline computes swiglu and swiglu_clamped, not {weights.config.activation}")
        self.weights, self.config, self.tile = weights, weights.config, tile

    def candidates(self, tokens: int) -> Sequence[Tile]:
        """Tiles to choose from for T=`tokens`."""
        return tiles_for(tokens * self.config.top_k / self.config.experts)

    def prepare(self, batch: Batch) -> Call:
        """What computes a batch."""
        tile = self.tile

        def call() -> Any:
            return self.compute(batch, tile)

        return call

    def compute(self, batch: Batch, tile: Tile) -> Any:
        """[T, H]."""
        w, c, x = self.weights, self.config, batch.x
        tokens, choices, i = len(x), len(x) * c.top_k, c.intermediate
        layout = self._alone(batch) if choices * _ALONE <= c.experts else self._sorted(batch, tile.m)
        h, hidden, y = (x.new_empty((choices, width)) for width in (2 * i, i, c.hidden))
        self._product(x, w.gate_up, w.gate_up_bias, h, batch, layout, tile, c.top_k, weighted=False)
        clamped = c.activation == "swiglu_clamped"
        grid = (choices, triton.cdiv(i, _BLOCK))
        kernels.activate_kernel[grid](h, hidden, i, c.swiglu_alpha, c.swiglu_limit, CLAMPED=clamped, BLOCK=_BLOCK)
        self._product(hidden, w.down, w.down_bias, y, batch, layout, tile, 1, weighted=True)
        out = torch.empty_like(x)
        kernels.sum_kernel[(tokens, triton.cdiv(c.hidden, _BLOCK))](y, out, c.hidden, TOP_K=c.top_k, BLOCK=_BLOCK)
        return out

    def _alone(self, batch: Batch) -> tuple[int, Any, Any, Any]:
        """(blocks, slots, expert of each block, blocks in use), every choice a block of its own."""
        return batch.ids.numel(), None, None, None

    def _sorted(self, batch: Batch, m: int) -> tuple[int, Any, Any, Any]:
        """The same, choices of one expert together; more blocks are reserved than may be in use."""
        experts, choices = self.config.experts, batch.ids.numel()
        blocks = min(choices, (choices + experts * (m - 1)) // m)
        slots, block_expert, counts, cursors, used = (
            torch.empty(size, dtype=torch.int32, device=batch.ids.device) for size in (blocks * m, blocks, experts, experts, 1)
        )
        kernels.begin_kernel[(triton.cdiv(max(blocks * m, experts), _BLOCK),)](
            slots, counts, choices, blocks * m, experts, BLOCK=_BLOCK
        )
        grid = (triton.cdiv(choices, _BLOCK),)
        kernels.count_kernel[grid](batch.ids, counts, choices, BLOCK=_BLOCK)
        kernels.place_kernel[(triton.cdiv(blocks, _PLACED),)](
            counts, cursors, block_expert, used, experts, blocks,
            M=m, EXPERTS=triton.next_power_of_2(experts), STEP=_PLACED,
        )  # fmt: skip
        kernels.scatter_kernel[grid](batch.ids, cursors, slots, choices, BLOCK=_BLOCK)
        return blocks, slots, block_expert, used

    def _product(
        self,
        a: Any,
        w: Any,
        bias: Any,
        out: Any,
        batch: Batch,
        layout: tuple[int, Any, Any, Any],
        tile: Tile,
        share: int,
        *,
        weighted: bool,
    ) -> None:
        blocks, slots, block_expert, used = layout
        n, k = w.shape[1:]
        kernels.product_kernel[(blocks * triton.cdiv(n, tile.n),)](
            a, w, bias, out, batch.factors, batch.ids, slots, block_expert, used,
            blocks, n, k, batch.ids.numel(), a.stride(0), w.stride(0), w.stride(1),
            SHARE=share, WEIGHTED=weighted, BIASED=bias is not None, SORTED=slots is not None,
            M=tile.m, N=tile.n, K=tile.k, GROUP=tile.group, EVEN=k % tile.k == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
