"""Kernels for Hopper: what may be chosen, what their machine code is made of, and what they compute, on the emulator."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
from moegen.schedules.cuda import hopper

from moegen.config import MoEConfig
from moegen.cuda import nvidia, sass
from moegen.cuda.architectures import KNOWN
from moegen.cuda.hopper import ARCHITECTURE, HopperKernel, hopper_kernel
from moegen.errors import ScheduleError

SIZES: dict[str, Any] = {"experts": 4, "top_k": 2, "hidden": 136, "intermediate": 72, "dtype": "bfloat16"}


def kernel_of(side: str, rows: int = 128, knobs: dict[str, int] | None = None, **fields: Any) -> HopperKernel:
    config = MoEConfig(**SIZES | fields)
    product = hopper.GroupedProduct.of(config, side)
    return hopper_kernel(config, product, dataclasses.replace(hopper.default(product, rows), **knobs or {}), f"{side}_{rows}")


def product_of(side: str, **fields: Any) -> hopper.GroupedProduct:
    return hopper.GroupedProduct.of(MoEConfig(**SIZES | fields), side)


# ---------------------------------------------------------------- what may be chosen


@pytest.mark.parametrize("side", ["up", "down"])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_defaults_are_legal_and_use_the_whole_multiplier(side: str, rows: int) -> None:
    product = product_of(side, hidden=4096, intermediate=14336)
    knobs = hopper.default(product, rows)
    hopper.check(product, knobs)
    sizes = hopper.layout(product, knobs)
    assert sizes.row_groups * sizes.atoms * 64 == rows
    assert sizes.width * hopper.CONSUMERS // sizes.row_groups == product.parts * knobs.columns
    assert sizes.stage_bytes % 1024 == sizes.rows_bytes % 1024 == sizes.share * 128 % 1024 == 0, "the swizzle's pattern"
    if rows == 128:
        assert product.parts * knobs.columns == 256
        assert knobs.stages == 4


def test_a_narrow_output_gets_narrow_tiles() -> None:
    product = product_of("down", hidden=64, intermediate=4096)
    assert hopper.default(product).columns == 64


@pytest.mark.parametrize(
    ("side", "knobs", "said"),
    [
        ("up", {"rows": 96}, "rows=96"),
        ("up", {"columns": 96}, "columns=96 must be a multiple of 64"),
        ("up", {"rows": 64, "columns": 64}, "columns=64 must be a multiple of 128"),
        ("up", {"columns": 192}, "384 columns"),
        ("down", {"rows": 256, "columns": 192}, "192 sums"),
        ("up", {"stages": 1}, "stages=1"),
        ("up", {"stages": 5}, "bytes of shared memory"),
        ("up", {"group": 0}, "group=0"),
    ],
)
def test_illegal_knobs_say_what_is_wrong(side: str, knobs: dict[str, int], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        hopper.check(product_of(side), hopper.Knobs(**knobs))


def test_sizes_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ScheduleError, match="k=132 must be a multiple of 8"):
        product_of("up", hidden=132)
    with pytest.raises(ScheduleError, match="float32"):
        product_of("up", dtype="float32")


def test_tensor_maps_obey_the_driver() -> None:
    """The rules that cuTensorMapEncodeTiled has for swizzled maps without an interleave."""
    for side in ("up", "down"):
        for rows in (64, 128, 256):
            product = product_of(side, hidden=2880, intermediate=2880)
            for each in hopper.tensor_maps(product, hopper.default(product, rows)):
                assert each.box[0] * 2 == 128
                assert all(0 < extent <= 256 for extent in each.box)
                assert all(stride % 16 == 0 and 0 < stride < 1 << 40 for stride in each.strides_bytes)
                assert len(each.dims) == len(each.box) == len(each.strides_bytes) + 1


# ---------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def listings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[collections.Counter[str], nvidia.Cubin]]:
    """Instructions of a few kernels, compiled at once."""
    wide = {"hidden": 2048, "intermediate": 704}
    kernels = [
        kernel_of("up", **wide),
        kernel_of("up", 64, expert_bias=True, activation="swiglu_clamped", weight_on_input=True, dtype="float16"),
        kernel_of("down", **wide),
        kernel_of("down", 256, expert_bias=True, dtype="float16"),
    ]
    folder = tmp_path_factory.mktemp("hopper")
    found = {}
    for kernel in kernels:
        made = nvidia.compile_kernels(kernel.source, [KNOWN[ARCHITECTURE]], folder, fast_math=True).cubins[0]
        found[kernel.name] = sass.count_instructions(sass.disassemble(made.code)[kernel.name]), made
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["up_128", "up_64", "down_128", "down_256"])
def test_the_machine_code_is_hoppers(name: str, listings: dict[str, tuple[collections.Counter[str], nvidia.Cubin]]) -> None:
    counted, cubin = listings[name]

    def count(family: str) -> int:
        return sass.of_family(counted, family)

    assert cubin.spilled_bytes[name] == 0
    assert cubin.resources[name].stack_bytes == 0
    assert cubin.resources[name].max_threads == hopper.THREADS
    assert count("LDL") == count("STL") == count("HMMA") == count("CALL") == 0
    assert count("HGMMA") >= 4
    assert count("UTMALDG") >= 1
    assert count("SYNCS") >= 4
    assert count("USETMAXREG") == 2
    assert count("STSM") >= 4
    assert (count("LDGSTS") > 0) == (count("ARRIVES") > 0) == name.startswith("up"), "rows are gathered for the first product"
