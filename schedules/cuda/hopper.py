"""The grouped products of large batches on Hopper (`sm_90a`): warpgroup matrix products fed by the tensor memory accelerator.

One block of threads per multiprocessor takes tile after tile. Its first warpgroup fills a ring of stages, 64 terms of the rows
and of the columns each; the other two multiply. What limits a tile, as a model and not a measurement (`cycles`): a
multiprocessor multiplies 2048 pairs and moves 128 bytes of shared memory in a cycle. A step of 128 rows and 256 columns takes
1024 cycles to multiply, and as many to move: 48 KiB are written, and 80 KiB read, because both warpgroups read all columns. So
such a tile just reaches the multiplier's rate, narrower ones do not, and gathered rows cost what copied ones do. At the end of a
tile the multiplier waits for a warpgroup's activation and stores (two special functions for each value of a gated activation,
16 in a cycle: some 2000 cycles of 128 x 128 hidden values, 6 % of a tile with H = 2048), unless the other one lags behind: the
ring lets it, by as many steps as there are stages. The producer is stages ahead, so that loads are never waited for there.
"""

from __future__ import annotations

import dataclasses

from moegen.cuda_geometry import CudaGeometry
from moegen.errors import ScheduleError

__all__ = [
    "ARCHITECTURE", "CONSUMERS", "FEWEST_ROWS", "STEP", "SUFFIX", "THREADS", "GroupedProduct", "Knobs", "Layout", "TensorMap",
    "check", "cycles", "default", "layout", "sides", "space", "tensor_maps",
]  # fmt: skip

ARCHITECTURE = "sm_90a"
SUFFIX = "_hopper"  # of a stage's name and its kernel's, beside those that all devices have
FEWEST_ROWS = 128  # of a block that is worth it by default: with fewer, reading weights takes longer than multiplying
DTYPES = {"bfloat16": "bf16", "float16": "f16"}  # as PTX names them
ITEM_BYTES = 2
STEP = 64  # terms of a stage: 128 bytes, the width of the swizzle that copies and products share
ATOM_ROWS = 64  # rows of a warpgroup's product
PRODUCT_TERMS = 16
CONSUMERS = 2
WARPGROUP = 128
THREADS = (1 + CONSUMERS) * WARPGROUP
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 72, 216  # of a thread, out of the 168 that all begin with
SLAB_COLUMNS = 64  # results that a warp turns into whole lines at once, of 16 rows
SLAB_BYTES = 16 * SLAB_COLUMNS * ITEM_BYTES
STORED_COLUMNS = 16 // ITEM_BYTES  # at once, of one row
ALIGNMENT_BYTES = 1024  # of a stage: eight rows of the swizzle
MAX_SHARED_BYTES = 232448  # of a block, on compute capability 9.0
MAX_BOX_ROWS = 256
MAX_SUMS = 128  # 32-bit registers of a thread that hold sums; the others are addresses and the activation's
MAX_STAGES = 8
BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class GroupedProduct:
    """One of the two products of the experts, for rows in blocks of one expert each.

    Args:
        side: `up`: rows [T, k] are gathered, and the activation is applied; `down`: rows lie in blocks, and results are weighted
            and go to their slots.
        experts: how many matrices there are.
        k: terms of rows and weights, zeros at their end; a multiple of 64.
        n: columns of weights and results; a multiple of 8.
        parts: 2 for gate and up, whose columns are computed side by side, else 1.
        dtype: `bfloat16` or `float16`, of rows, weights and results; sums are float32.
        bias: float32 [experts, parts, n] is added to the sums.
        weighted: sums are multiplied by their row's weight: results for `down`, and for `up` before bias and activation, as if
            the input had been.
    """

    side: str
    experts: int
    k: int
    n: int
    parts: int
    dtype: str
    bias: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        for name, multiple in (("k", STEP), ("n", STORED_COLUMNS)):
            if getattr(self, name) % multiple:
                raise ScheduleError(f"{name}={getattr(self, name)} must be a multiple of {multiple}")
        if self.dtype not in DTYPES:
            raise ScheduleError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}: Hopper's products of rows and weights")
        if self.side not in ("up", "down") or self.parts not in ((1, 2) if self.side == "up" else (1,)):
            raise ScheduleError(f"side={self.side!r} with parts={self.parts} must be 'up' with 1 or 2, or 'down' with 1")

    @classmethod
    def of(cls, geometry: CudaGeometry, side: str) -> GroupedProduct:
        """The product `side` of a layer's routed experts."""
        config, p = geometry.config, geometry.products[side]
        weighted = config.weight_on_input == (side == "up")
        return cls(side, p.count, p.k_padded, p.n_padded, p.parts, p.dtype, config.expert_bias, weighted)


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may be chosen.

    Args:
        rows: of a block, as dispatch makes them: 64 (both consumers share them and halve the columns), 128 or 256.
        columns: of a tile; with gate and up, of each.
        stages: of the ring.
        group: blocks whose tiles are taken together, a column of tiles at a time. Tiles taken at one time are those of
            neighbouring blocks, mostly of one expert, and of neighbouring columns: with 132 multiprocessors, 16 blocks times 8
            columns, so that second-level cache serves each row 8 times and each weight up to 16 times.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 4
    group: int = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes that follow from a product and its knobs.

    Args:
        row_groups: consumers whose rows differ; the others differ in columns.
        atoms: products of 64 rows by a consumer for each step.
        share: columns of a consumer, in each part.
        width: columns of a consumer's product, all parts side by side.
        steps: stages that a tile takes.
        column_tiles: tiles of a block.
        rows_bytes: of a stage, for rows; a multiple of 1024, as the following.
        stage_bytes: of a stage.
        barrier_offset: where the barriers begin, in bytes; first those of full stages, then those of empty ones.
        shared_bytes: of shared memory to ask for.
    """

    row_groups: int
    atoms: int
    share: int
    width: int
    steps: int
    column_tiles: int
    rows_bytes: int
    stage_bytes: int
    barrier_offset: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """What `cuTensorMapEncodeTiled` is told about one array, so that copies of boxes of it may be asked for.

    Elements outside the array read as zeros (`CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE`) and count among a box's bytes. Element strides
    are 1 and the interleave is `CU_TENSOR_MAP_INTERLEAVE_NONE`.

    Args:
        name: the kernel's argument, `const __grid_constant__ CUtensorMap`; the array begins at a multiple of 16 bytes.
        dtype: `CU_TENSOR_MAP_DATA_TYPE_`: BFLOAT16 for `bfloat16`, FLOAT16 for `float16`.
        dims: elements of each dimension, those next to one another first. `rows` is how many rows the call's blocks may have.
        strides_bytes: from one element of a dimension to the next, from the second dimension on; multiples of 16.
        box: elements of a copy in each dimension.
        swizzle: `CU_TENSOR_MAP_SWIZZLE_`.
        l2_promotion: `CU_TENSOR_MAP_L2_PROMOTION_`: a box is half of what the next step also reads.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: str = "128B"
    l2_promotion: str = "L2_256B"


def sides(geometry: CudaGeometry) -> tuple[str, ...]:
    """The products of a layer that can be computed here: `down` stores what `up` does, 16 bits, which float16's terms are not."""
    if geometry.config.dtype not in DTYPES:
        return ()
    return ("up", "down") if geometry.terms_type == geometry.config.dtype else ("up",)


def layout(product: GroupedProduct, knobs: Knobs) -> Layout:
    """Sizes of a kernel."""
    row_groups = min(CONSUMERS, knobs.rows // ATOM_ROWS)
    share = knobs.columns // (CONSUMERS // row_groups)
    row_bytes = STEP * ITEM_BYTES
    stage_bytes = (knobs.rows + product.parts * knobs.columns) * row_bytes
    barrier_offset = knobs.stages * stage_bytes + CONSUMERS * WARPGROUP // 32 * SLAB_BYTES
    return Layout(
        row_groups=row_groups,
        atoms=knobs.rows // (row_groups * ATOM_ROWS),
        share=share,
        width=product.parts * share,
        steps=product.k // STEP,
        column_tiles=-(-product.n // knobs.columns),
        rows_bytes=knobs.rows * row_bytes,
        stage_bytes=stage_bytes,
        barrier_offset=barrier_offset,
        # Where dynamic shared memory begins is not promised to be aligned so far.
        shared_bytes=barrier_offset + 2 * BARRIER_BYTES * knobs.stages + ALIGNMENT_BYTES - 16,
    )


def check(product: GroupedProduct, knobs: Knobs) -> None:
    """Legality.

    Raises:
        ScheduleError: a number is out of range, or sums or stages do not fit.
    """
    _check_rows(knobs.rows)
    sizes = layout(product, knobs)
    if knobs.columns < 1 or sizes.share % SLAB_COLUMNS:
        raise ScheduleError(f"columns={knobs.columns} must be a multiple of {SLAB_COLUMNS * CONSUMERS // sizes.row_groups}")
    if sizes.width > MAX_BOX_ROWS:
        raise ScheduleError(f"columns={knobs.columns} make products of {sizes.width} columns; {MAX_BOX_ROWS} are the most")
    if sizes.atoms * sizes.width // 2 > MAX_SUMS:
        raise ScheduleError(f"rows={knobs.rows} and columns={knobs.columns} need {sizes.atoms * sizes.width // 2} sums of a thread")
    if not 2 <= knobs.stages <= MAX_STAGES:
        raise ScheduleError(f"stages={knobs.stages} must be between 2 and {MAX_STAGES}")
    if sizes.shared_bytes > MAX_SHARED_BYTES:
        raise ScheduleError(f"stages={knobs.stages} need {sizes.shared_bytes} bytes of shared memory; {MAX_SHARED_BYTES} are there")
    if knobs.group < 1:
        raise ScheduleError(f"group={knobs.group} must be at least 1")


def cycles(product: GroupedProduct, knobs: Knobs) -> float:
    """Cycles of a multiprocessor for one block of rows and all columns, without the ends of tiles: a model (see above)."""
    sizes = layout(product, knobs)
    multiply = knobs.rows * product.parts * knobs.columns * STEP / 2048
    read = CONSUMERS * sizes.atoms * (ATOM_ROWS + sizes.width) * STEP * ITEM_BYTES
    return sizes.column_tiles * sizes.steps * max(multiply, (sizes.stage_bytes + read) / 128)


def default(product: GroupedProduct, rows: int = 128) -> Knobs:
    """The columns of fewest cycles for blocks of `rows`, the widest where several are, and as many stages as fit.

    Raises:
        ScheduleError: `rows` is illegal.
    """
    _check_rows(rows)
    candidates = [Knobs(rows, columns, stages) for columns in range(256, 0, -64) for stages in range(MAX_STAGES, 1, -1)]
    return min((knobs for knobs in candidates if _legal(product, knobs)), key=lambda knobs: cycles(product, knobs))


def tensor_maps(product: GroupedProduct, knobs: Knobs) -> tuple[TensorMap, ...]:
    """The tensor maps that a kernel takes, by the names of its arguments."""
    k, pitch = product.k, (product.k * ITEM_BYTES,)
    columns = product.experts * product.parts * product.n
    weights = TensorMap("weights", product.dtype, (k, columns), pitch, (STEP, layout(product, knobs).share))
    if product.side == "up":
        return (weights,)
    return (TensorMap("rows", product.dtype, (k, "rows"), pitch, (STEP, knobs.rows)), weights)


def space(product: GroupedProduct, rows: int) -> dict[str, tuple[int, ...]]:
    """The values worth trying for each knob, for blocks of `rows`; not all of their combinations are legal."""
    columns = tuple(n for n in (64, 128, 192, 256) if _legal(product, Knobs(rows, n, 2)))
    return {"columns": columns, "stages": (3, 4, 5, 6), "group": (8, 16, 32)}


def _check_rows(rows: int) -> None:
    if rows not in (64, 128, 256):
        raise ScheduleError(f"rows={rows} must be 64, 128 or 256")


def _legal(product: GroupedProduct, knobs: Knobs) -> bool:
    try:
        check(product, knobs)
    except ScheduleError:
        return False
    return True
