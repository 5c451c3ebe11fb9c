"""Kernels for Hopper: what may be chosen, what their machine code is made of, and what they compute, on the emulator."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import built_once
from moegen.schedules.cuda import hopper

import moegen
from moegen import reference
from moegen.config import MoEConfig
from moegen.cuda import listing, making, nvidia, planning, proof, sass
from moegen.cuda.architectures import KNOWN
from moegen.cuda.emulated_driver import environment
from moegen.cuda.emulator import Emulated
from moegen.cuda.guarded import device_array, on_device
from moegen.cuda.hopper import lower
from moegen.cuda.kernels import HopperKernel, HopperProgram
from moegen.cuda_geometry import CudaGeometry
from moegen.errors import ScheduleError

SIZES: dict[str, Any] = {"experts": 4, "top_k": 2, "hidden": 136, "intermediate": 72, "dtype": "bfloat16"}
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def geometry_of(**fields: Any) -> CudaGeometry:
    return CudaGeometry(MoEConfig(**SIZES | fields))


def product_of(side: str, **fields: Any) -> hopper.GroupedProduct:
    return hopper.GroupedProduct.of(geometry_of(**fields), side)


def program_of(geometry: CudaGeometry, **rows: int) -> HopperProgram:
    """The kernels of these sides for blocks of so many rows: program_of(geometry, up=128)."""
    sides = {f"{side}_{m}": hopper.default(hopper.GroupedProduct.of(geometry, side), m) for side, m in rows.items()}
    return lower(geometry, sides)


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


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ScheduleError, match="k=132 must be a multiple of 64"):
        hopper.GroupedProduct("up", 4, 132, 64, 2, "bfloat16")
    with pytest.raises(ScheduleError, match="float32"):
        product_of("up", dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "gpus", "stages"),
    [
        ("bfloat16", "sm_80,sm_90a", ["up_128_hopper", "down_128_hopper"]),
        ("float16", "sm_90a", ["up_128_hopper"]),  # whose terms are float32
        ("float32", "sm_90a", []),
        ("bfloat16", "sm_90", []),
    ],
)
def test_which_layers_have_kernels_of_hoppers_own(dtype: str, gpus: str, stages: list[str]) -> None:
    found = planning.plan(MoEConfig(**SIZES | {"dtype": dtype}), gpus).knobs
    assert [stage for stage in found if stage.endswith(hopper.SUFFIX)] == stages


def test_an_edited_layer_has_none(tmp_path: pathlib.Path) -> None:
    """They are not made from the text that was edited, and would compute what it was before."""
    path = tmp_path / "te_source.py"
    path.write_text(planning.plan(MoEConfig(**SIZES), "sm_90a").te_source, encoding="utf-8")
    assert not any(stage.endswith(hopper.SUFFIX) for stage in planning.plan_from_source(path, "sm_90a").knobs)


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
    odd = {"expert_bias": True, "dtype": "float16"}
    programs = (
        program_of(geometry_of(hidden=2048, intermediate=704), up=128, down=128),
        program_of(geometry_of(**odd, activation="swiglu_clamped", weight_on_input=True), up=64),
        program_of(geometry_of(**odd), down=256),
    )
    found = {}
    for program in programs:
        folder = tmp_path_factory.mktemp("hopper")
        made = nvidia.compile_kernels(program.source, [KNOWN[hopper.ARCHITECTURE]], folder, fast_math=True).cubins[0]
        for name, text in sass.disassemble(made.code).items():
            found[name] = sass.count_instructions(text), made
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["up_128_hopper", "up_64_hopper", "down_128_hopper", "down_256_hopper"])
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


# ---------------------------------------------------------------- what a kernel computes


class Blocks:
    """Rows of experts in blocks as dispatch makes them; padding and the blocks behind the last are -1, as poison is."""

    def __init__(self, counts: list[int], height: int, tokens: int, rng: np.random.Generator) -> None:
        owners = [expert for expert, count in enumerate(counts) for _ in range(-(-count // height))]
        self.used, self.height = len(owners), height
        self.expert = device_array(self.used + 2, np.int32)
        self.expert[: self.used] = owners
        self.token, self.slot = (device_array((self.used + 2) * height, np.int32) for _ in range(2))
        self.weight = device_array((self.used + 2) * height, np.float32)
        slots, at = rng.permutation(sum(counts)), 0
        for expert, count in enumerate(counts):
            first = owners.index(expert) * height if count else 0
            self.token[first : first + count] = rng.integers(0, tokens, count)
            self.slot[first : first + count] = slots[at : at + count]
            at += count
        self.weight[: self.used * height] = rng.uniform(0.25, 1.0, self.used * height)

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """Where there is a row, and no padding."""
        return np.flatnonzero(self.token >= 0)

    @property
    def experts(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Of these rows."""
        return np.asarray(self.expert[self.rows // self.height])


def launch(program: HopperProgram, given: dict[str, Any], folder: pathlib.Path, grid: int, **how: Any) -> HopperKernel:
    """Runs the only kernel of a program on the emulator, tensor maps made of the arrays of their names."""
    (kernel,) = program.kernels
    emulated = Emulated(program.source, folder, arch=hopper.ARCHITECTURE)
    maps = {}
    for wanted in kernel.tensor_maps:
        assert wanted.dims[0] * hopper.ITEM_BYTES == wanted.strides_bytes[0] == given[wanted.name].strides[-2]
        matrix = given[wanted.name].reshape(-1, wanted.dims[0])
        assert wanted.dims[1] in ("rows", len(matrix))
        maps[wanted.name] = emulated.tensor_map(matrix, tuple(reversed(wanted.box)), 128)
    arguments = [(given | maps | {"grid": grid})[name] for name in kernel.arguments]
    emulated.launch(kernel.symbol, grid, kernel.threads, arguments, kernel.shared_bytes, **how)
    return kernel


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray[Any, Any]:
    return on_device((rng.standard_normal(shape) * scale).astype(TYPES[dtype]), 128)


def assert_rounded(got: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], dtype: str) -> None:
    """One rounding of float32 arithmetic."""
    ulp = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    error = np.abs(got.astype(np.float64) - exact)
    assert (error <= 1.02 * ulp * np.abs(exact) + 2e-5 * np.sqrt(np.mean(exact**2))).all(), error.max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("emulated")


UP = {
    "gated": (128, 7, {}),
    "everything": (64, 132, {"expert_bias": True, "weight_on_input": True, "activation": "swiglu_clamped", "dtype": "float16"}),
    "ungated": (256, 1, {"activation": "gelu", "intermediate": 200}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UP)
def test_up(case: str, rng: np.random.Generator, folder: pathlib.Path) -> None:
    """Ragged blocks, an expert without rows, and blocks that dispatch did not need, over poison."""
    height, grid, fields = UP[case]
    geometry = geometry_of(**fields)
    config, p = geometry.config, geometry.up
    blocks = Blocks([height + 5, 0, 1, height], height, 50, rng)
    x, weights = drawn(rng, (50, p.k_padded), config.dtype), drawn(rng, p.shape, config.dtype, p.k_padded**-0.5)
    bias = on_device(rng.standard_normal(p.bias_shape).astype(np.float32))
    output = device_array((len(blocks.token), p.n_padded), TYPES[config.dtype])
    given = {"x": x, "weights": weights, "bias": bias, "output": output, "blocks": on_device(np.array([blocks.used], np.int32))}
    given |= {"row_token": blocks.token, "row_weight": blocks.weight, "block_expert": blocks.expert}
    launch(program_of(geometry, up=height), given, folder, grid, order="shuffled", seed=1)

    exact = weights.astype(np.float64)[blocks.experts] @ x.astype(np.float64)[blocks.token[blocks.rows], None, :, None]
    sums = exact[..., 0] * (blocks.weight[blocks.rows, None, None] if config.weight_on_input else 1.0)
    sums += bias[blocks.experts] if config.expert_bias else 0.0
    assert_rounded(output[blocks.rows], reference.activate(config, sums[:, 0], sums[:, -1]), config.dtype)
    assert np.isfinite(output[: blocks.used * height].astype(np.float32)).all(), "padding is read by the next product"
    assert np.isnan(output[blocks.used * height :].astype(np.float32)).all(), "blocks that were not needed"


DOWN = {"weighted": (128, 5, {}), "plain": (256, 132, {"expert_bias": True, "weight_on_input": True, "hidden": 328})}


@pytest.mark.slow
@pytest.mark.parametrize("case", DOWN)
def test_down(case: str, rng: np.random.Generator, folder: pathlib.Path) -> None:
    """Every row goes to its slot; what padding rows hold goes nowhere."""
    height, grid, fields = DOWN[case]
    geometry = geometry_of(**fields)
    config, p = geometry.config, geometry.down
    blocks = Blocks([1, height + 9, 0, 40], height, 50, rng)
    hidden = device_array((len(blocks.token), p.k_padded), TYPES[config.dtype], 128)  # padding stays NaN
    hidden[blocks.rows] = rng.standard_normal((len(blocks.rows), p.k_padded))
    weights = drawn(rng, p.shape, config.dtype, p.k_padded**-0.5)
    bias = on_device(rng.standard_normal(p.bias_shape).astype(np.float32))
    y = device_array((len(blocks.rows) + 3, p.n_padded), TYPES[config.dtype])
    given = {"rows": hidden, "weights": weights, "bias": bias, "output": y, "blocks": on_device(np.array([blocks.used], np.int32))}
    given |= {"row_slot": blocks.slot, "row_weight": blocks.weight, "block_expert": blocks.expert}
    launch(program_of(geometry, down=height), given, folder, grid, order="shuffled", seed=2)

    exact = (weights.astype(np.float64)[blocks.experts, 0] @ hidden[blocks.rows].astype(np.float64)[..., None])[..., 0]
    exact += bias[blocks.experts, 0] if config.expert_bias else 0.0
    exact *= 1.0 if config.weight_on_input else blocks.weight[blocks.rows, None]
    assert_rounded(y[blocks.slot[blocks.rows]], exact, config.dtype)
    assert np.isnan(y[len(blocks.rows) :].astype(np.float32)).all()


# ---------------------------------------------------------------- a whole layer


@pytest.fixture(scope="module")
def layer(store: pathlib.Path) -> moegen.Artifact:
    """Of two architectures, with blocks of 128 rows only; not proven when it is built, as that is what follows."""
    config = MoEConfig(experts=3, top_k=2, hidden=136, intermediate=130, dtype="bfloat16", shared_intermediate=64)
    todo = planning.default_plan(config, planning.resolve_target("sm_80,sm_90a"), (128,))
    return built_once(store, dataclasses.replace(todo, route_tokens=0))


@pytest.mark.slow
def test_a_layer_shows_its_kernels(layer: moegen.Artifact) -> None:
    used = layer.manifest["resources"]
    own = {name for name in used["sm_90a"] if name.endswith(hopper.SUFFIX)}
    assert own == {"up_128_hopper", "down_128_hopper"}
    assert used["sm_80"].keys() == used["sm_90a"].keys() - own
    assert all(used["sm_90a"][name]["spilled_bytes"] == 0 for name in own)
    assert all(used["sm_90a"][name]["dynamic_shared_bytes"] > 100_000 for name in own)
    counted = {name: sass.count_instructions(text) for name, text in listing.sass(layer)["sm_90a"].items()}
    assert counted.keys() == used["sm_90a"].keys()
    for name in own:
        assert sass.of_family(counted[name], "HGMMA") >= 4
        assert sass.of_family(counted[name], "UTMALDG") >= 1
        assert name in listing.source(layer)
    assert ".target sm_80" in listing.ptx(layer), "a newer device compiles what is specific to none"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80", "sm_100"])
def test_a_layer_is_right(arch: str, layer: moegen.Artifact, folder: pathlib.Path) -> None:
    """On Hopper with its own kernels, elsewhere without them."""
    kernels, own = making.sources(layer.path)
    around = environment(kernels, folder, arch=hopper.ARCHITECTURE, also=[own] if arch == hopper.ARCHITECTURE else [])
    around["MOEGEN_EMULATED_ARCH"] = arch  # the device; its kernels need not be compiled again
    report = proof.report_from(layer, around, 3, [2, 40, 300] if arch == hopper.ARCHITECTURE else [145])
    assert report["status"] == "passed", report["failures"]


@pytest.mark.slow
def test_a_wrong_kernel_of_hoppers_own_shows(layer: moegen.Artifact, folder: pathlib.Path) -> None:
    """So the layer's sums do come from there."""
    kernels, own = making.sources(layer.path)
    wrong = own.replace("__expf(", "-__expf(")
    assert wrong != own
    around = environment(kernels, folder, arch="sm_90a", also=[wrong])
    assert proof.report_from(layer, around, 3, [145])["status"] == "failed"
