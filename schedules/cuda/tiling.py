"""How the products are cut into tiles on a CUDA device: legality, the space, and what is taken when nothing was tuned.

How weights are packed does not depend on it.
"""

from __future__ import annotations

import dataclasses
import itertools

from moegen.cuda_geometry import K_MULTIPLE, Product
from moegen.errors import ScheduleError

ROWS = (16, 64, 128)  # of the row blocks that there are tile kernels for
MOST_SUMS = 128  # of one thread: half of its registers
OTHER_REGISTERS = 96  # of one thread: fragments, addresses and what the epilogue needs; with 64 the compiler spills some
MOST_REGISTERS, BLOCK_REGISTERS = 255, 65536  # of one thread, and of all threads of a block together
MOST_COPIES = 16  # of 16 bytes that one thread begins for a stage: they are unrolled
FEW_LANES_BYTES = 128  # of one row of weights that neighbouring threads read together


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of one thread block, which goes through the whole dot product.

    Args:
        rows: rows of the tile (M): a row block of one expert.
        columns: columns of each part (gate, up) in the tile.
        terms: terms of the dot product in one stage of shared memory.
        stages: stages of the pipeline from global to shared memory.
        row_warps, column_warps: the warps, and how they share the tile.
    """

    rows: int
    columns: int
    terms: int
    stages: int
    row_warps: int
    column_warps: int

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.row_warps * self.column_warps

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return 32 * self.warps

    @property
    def registers(self) -> int:
        """Registers that a thread may have: more would not fit into a multiprocessor."""
        return min(MOST_REGISTERS, BLOCK_REGISTERS // self.threads)

    def blocks(self, parts: int) -> int:
        """Thread blocks that the registers of a multiprocessor are enough for."""
        return max(1, BLOCK_REGISTERS // (self.threads * (self.sums(parts) + OTHER_REGISTERS)))

    @property
    def thread_rows(self) -> int:
        """Rows of one thread, which are neighbours: two of each fragment of 16."""
        return self.rows // self.row_warps // 8

    @property
    def thread_columns(self) -> int:
        """Columns of one thread in each part, which are neighbours: two of each fragment of 8."""
        return self.columns // self.column_warps // 4

    def sums(self, parts: int) -> int:
        """Sums of one thread."""
        return self.thread_rows * self.thread_columns * parts

    def shared_bytes(self, parts: int, item_bytes: int) -> int:
        """Shared memory of a thread block."""
        return self.stages * (self.rows + parts * self.columns) * self.terms * item_bytes


def default(rows: int, product: Product, item_bytes: int, most_shared_bytes: int) -> Tile:
    """By the height of the row block; of wide types, half as many terms are a stage. As many stages as fit, up to what helps."""
    terms = 64 if item_bytes == 2 else 32
    wide = product.parts == 1 and product.n_padded % 128 == 0
    if rows == 16:
        tile = Tile(16, 64 if product.parts == 1 else 32, terms, 4, 1, 4)
    elif rows == 64:
        tile = Tile(64, 128, terms, 3, 2, 2) if wide else Tile(64, 64, terms, 4 if product.parts == 1 else 3, 2, 2)
    else:
        tile = Tile(128, 128 if wide else 64, terms, 3, 4, 2)
    while tile.stages > 2 and tile.shared_bytes(product.parts, item_bytes) > most_shared_bytes:
        tile = dataclasses.replace(tile, stages=tile.stages - 1)
    return tile


def check(tile: Tile, product: Product, item_bytes: int, most_shared_bytes: int) -> None:
    """Legality.

    Raises:
        ScheduleError: the tile does not fit the product, the registers or the shared memory.
    """
    if tile.rows % (16 * tile.row_warps) or tile.rows < 16:
        raise ScheduleError(f"rows={tile.rows} must be a multiple of 16 for each of row_warps={tile.row_warps}")
    if tile.columns % (8 * tile.column_warps):
        raise ScheduleError(f"columns={tile.columns} must be a multiple of 8 for each of column_warps={tile.column_warps}")
    if product.n_padded % tile.columns:
        raise ScheduleError(f"columns={tile.columns} must divide the {product.n_padded} columns of the product")
    if tile.terms * item_bytes not in (64, 128) or K_MULTIPLE % tile.terms:
        raise ScheduleError(f"terms={tile.terms} must be 64 or 128 bytes and divide {K_MULTIPLE}")
    if not 2 <= tile.stages <= 8:
        raise ScheduleError(f"stages={tile.stages} must be between 2 and 8")
    if not 1 <= tile.warps <= 16:
        raise ScheduleError(f"row_warps * column_warps = {tile.warps} must be between 1 and 16")
    if product.parts * tile.columns // tile.column_warps // 8 % 2:
        raise ScheduleError(f"columns={tile.columns} must give each warp an even number of fragments of 8 columns")
    if (sums := tile.sums(product.parts)) > MOST_SUMS:
        raise ScheduleError(f"a thread would have {sums} sums, more than {MOST_SUMS}: more warps or a smaller tile")
    for name, values in (("rows", tile.rows), ("columns", product.parts * tile.columns)):
        if values * tile.terms * item_bytes % (16 * tile.threads):
            raise ScheduleError(f"{name} of a stage must be a multiple of 16 bytes for each of {tile.threads} threads")
    if (needed := tile.shared_bytes(product.parts, item_bytes)) > most_shared_bytes:
        raise ScheduleError(f"stages={tile.stages} need {needed} bytes of shared memory; a thread block has {most_shared_bytes}")


def space(rows: int, product: Product, item_bytes: int, most_shared_bytes: int) -> tuple[Tile, ...]:
    """Every legal tile of a height that is worth trying."""
    warps = ((1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4))
    sizes = itertools.product((16, 32, 64, 128), (16, 32, 64), (2, 3, 4, 5, 6), warps)
    tiles = (Tile(rows, columns, terms, stages, *both) for columns, terms, stages, both in sizes)
    return tuple(tile for tile in tiles if _worth_trying(tile, product, item_bytes, most_shared_bytes))


def _worth_trying(tile: Tile, product: Product, item_bytes: int, most_shared_bytes: int) -> bool:
    """Legal, with sums that stay in registers and copies that are soon begun."""
    try:
        check(tile, product, item_bytes, most_shared_bytes)
    except ScheduleError:
        return False
    copies = (tile.rows + product.parts * tile.columns) * tile.terms * item_bytes // (16 * tile.threads)
    return tile.sums(product.parts) + OTHER_REGISTERS <= tile.registers and copies <= MOST_COPIES
