"""The tile kernels: their machine code on several processors, and their numbers for every height and split of an expert's rows."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, bits, built_once, built_with, stored, tokens, values
from listings import Instruction, complaints, functions, kernel, products

import moegen
from moegen import compiler, reference
from moegen.plan import Plan, plan

# ---------------------------------------------------------------- machine code


@dataclasses.dataclass(frozen=True)
class Code:
    """What the kernels of a dtype must be made of on a processor: the multiply-adds, the kind of their sums, the largest tile."""

    dtype: str
    mcpu: str
    arch: str
    multiply_add: str
    sums: str
    max_rows: int
    activation: str = "swiglu"

    def __str__(self) -> str:
        return f"{self.dtype}-{self.mcpu}-{self.activation}"


CODES = [
    Code("float32", "znver5", "x86_64", "vfmadd231ps", r"%zmm\d+", 14),
    Code("bfloat16", "znver5", "x86_64", "vdpbf16ps", r"%zmm\d+", 14),
    Code("float32", "x86-64-v3", "x86_64", "vfmadd231ps", r"%ymm\d+", 6),
    Code("float32", "znver3", "x86_64", "vfmadd231ps", r"%ymm\d+", 6, "relu"),
    Code("bfloat16", "x86-64-v3", "x86_64", "vfmadd231ps", r"%ymm\d+", 6),
    Code("float32", "x86-64", "x86_64", "mulps", r"%xmm\d+", 4),
    Code("float32", "x86-64", "x86_64", "mulps", r"%xmm\d+", 4, "relu"),
    Code("float32", "generic", "aarch64", "fmla", r"v\d+\.4s", 8),
    Code("bfloat16", "neoverse-v2", "aarch64", "fmla", r"v\d+\.4s", 8, "relu"),
    Code("float16", "neoverse-v2", "aarch64", "fmla", r"v\d+\.4s", 8),
]


def _plan(code: Code) -> Plan:
    """Sums of both products in several blocks; neither size is a multiple of anything."""
    config = moegen.MoEConfig(
        experts=4, top_k=2, hidden=1057, intermediate=1100, dtype=code.dtype, activation=code.activation, expert_bias=True
    )
    return plan(config, mcpu=code.mcpu, arch=code.arch)


def _assembly(todo: Plan, *stages: str) -> str:
    return compiler.assembly(todo.te_source, stages, todo.geometry, todo.target, todo.knobs)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_products_are_multiply_adds_in_registers(code: Code) -> None:
    """In the loops along the dot product of each kernel: two multiply-adds per row and step, into as many registers, no stores and
    nothing moved to or from the stack, and memory is asked for what comes next."""
    todo = _plan(code)
    assert todo.geometry.tiling.max_rows == code.max_rows
    stages = [f"expert_{product}_{rows}" for product in ("up", "down") for rows in todo.geometry.tiling.row_tiles]
    text = _assembly(todo, *stages)
    for stage in stages:
        rows, lines = int(stage.rpartition("_")[2]), kernel(text, stage)
        assert complaints(lines, rows) == [], stage
        for product in products(lines):
            names = {i.name for i in product.innermost.instructions if i.multiply_adds}
            if names == {"vfmadd213ps"} and code.dtype != "float32" and rows == 1:
                continue  # adds to the widened weights, which nothing else needs: the sums move from register to register
            assert names == {code.multiply_add}, stage
            adds = [i for i in product.chunks.instructions if i.name == code.multiply_add.replace("mulps", "addps")]
            sums = {i.operands[0 if i.is_arm else -1] for i in adds}
            if code.multiply_add == "mulps":  # whose addps may put a sum where the product was
                assert len(sums) >= 2 * rows, stage
            else:
                assert len(sums) == 2 * rows, stage
            assert all(re.fullmatch(code.sums, register) for register in sums), stage


@pytest.mark.parametrize("mcpu", ["znver4", "znver5", "cooperlake", "sapphirerapids", "graniterapids"])
def test_bfloat16_pairs_where_there_is_an_instruction(mcpu: str) -> None:
    todo = _plan(Code("bfloat16", mcpu, "x86_64", "vdpbf16ps", "", 14))
    assert todo.geometry.tiling.pair == 2
    (product,) = products(kernel(_assembly(todo, "expert_up_9"), "expert_up_9"))
    assert {i.name for i in product.innermost.instructions if i.multiply_adds} == {"vdpbf16ps"}


@pytest.mark.parametrize("mcpu", ["x86-64-v4", "skylake-avx512", "znver3"])
def test_bfloat16_as_float32_where_there_is_none(mcpu: str) -> None:
    todo = _plan(Code("bfloat16", mcpu, "x86_64", "vfmadd231ps", "", 14))
    assert todo.geometry.tiling.pair == 1
    lines = kernel(_assembly(todo, "expert_down_5"), "expert_down_5")
    assert complaints(lines, 5) == []
    assert "vfmadd231ps" in "\n".join(lines)


@pytest.fixture(scope="module")
def listings() -> dict[str, list[str]]:
    """The same kernel for both architectures."""
    found = {}
    for code in (CODES[0], CODES[7]):
        found[code.arch] = kernel(_assembly(_plan(code), "expert_up_7"), "expert_up_7")
        assert complaints(found[code.arch], 7) == []
    return found


MOVES = {
    "x86_64": {
        "spill": ["\tvmovups\t%zmm3, 64(%rsp)", "\tvmovups\t64(%rsp), %zmm3"],
        "fold": ["\tvaddps\t64(%rsp), %zmm3, %zmm3"],
        "store": ["\tvmovups\t%zmm3, (%rax)"],
        "count": ["\tincq\t(%rax)"],
        "more": ["\tvfmadd231ps\t%zmm3, %zmm4, %zmm5"],
    },
    "aarch64": {
        "spill": ["\tstr\tq3, [sp, #64]", "\tldr\tq3, [sp, #64]"],
        "fold": ["\tldp\tq3, q4, [sp, #64]"],
        "store": ["\tstr\tq3, [x8]"],
        "count": ["\tstr\tx3, [x8]"],
        "more": ["\tfmla\tv1.4s, v2.4s, v3.s[0]"],
    },
}
SAID = {
    "spill": "moves vectors to or from the stack 2 times",
    "fold": "moves vectors to or from the stack 1 times",
    "store": "stores 1 times",
    "count": "stores 1 times",
    "more": "multiply-adds for",
}


@pytest.mark.parametrize("arch", MOVES)
@pytest.mark.parametrize("doctoring", SAID)
def test_doctored_listings_are_noticed(doctoring: str, arch: str, listings: dict[str, list[str]]) -> None:
    lines, more = listings[arch], MOVES[arch][doctoring]
    inside = next(n for n, line in enumerate(lines) if re.search(r"vfmadd231ps|fmla", line))
    said = complaints([*lines[: inside + 1], *more, *lines[inside + 1 :]], 7)
    assert any(SAID[doctoring] in sentence for sentence in said), said
    assert complaints([*lines[:3], *more, *lines[3:]], 7) == [], "what happens outside of the loops is of no concern"


@pytest.mark.parametrize("arch", MOVES)
def test_missing_instructions_are_noticed(arch: str, listings: dict[str, list[str]]) -> None:
    lines = listings[arch]
    assert complaints([line for line in lines if "prefetch" not in line and "prfm" not in line], 7) == [
        "no loop multiplies and asks memory ahead"
    ]
    inside = next(n for n, line in enumerate(lines) if re.search(r"vfmadd231ps|fmla", line))
    assert "multiply-adds for" in " ".join(complaints([*lines[:inside], *lines[inside + 1 :]], 7))
    assert complaints(lines, 6), "another number of rows"


def test_instructions_are_read_right() -> None:
    read = Instruction.parse
    assert read("\tvfmadd231ps\t(%rdi,%rax,4){1to16}, %zmm1, %zmm2").operands == ("(%rdi,%rax,4){1to16}", "%zmm1", "%zmm2")
    assert read("\tstp\tq0, q1, [sp, #32]").operands == ("q0", "q1", "[sp, #32]")
    assert read("\tld1r\t{ v30.4s }, [x18], #4").weights_loaded == 0
    assert read("\tmovl\t$5, %eax  # imm = 0x5").operands == ("$5", "%eax")
    assert [read(f"\t{text}").stores for text in ("cmpq\t$0, 8(%rsp)", "vmovaps\t(%rax), %zmm0", "decq\t8(%rsp)")] == [0, 0, 1]
    assert [read(f"\t{text}").weights_loaded for text in ("vmovaps\t(%rax), %zmm0", "vbroadcastss\t(%rax), %zmm0")] == [1, 0]
    assert read("\tldp\tq0, q1, [x3], #32").weights_loaded == 2
    assert not read("\tldp\tx0, x1, [sp, #32]").spills
    assert read("\tb.ne\t.LBB0_3").target == read("\tjmp\t.LBB0_3").target == read("\tcbz\tx1, .LBB0_3").target == ".LBB0_3"


def test_assembly_of_one_function() -> None:
    """The listing is the code that is built, less the lines for debuggers."""
    todo = plan(moegen.MoEConfig(experts=2, top_k=1, hidden=16, intermediate=16, activation="relu"))
    text = _assembly(todo, "topk")
    assert "__tvm_ffi_topk" in functions(text)
    assert not re.search(r"\.loc\b|\.cfi_|\.debug|\.Ltmp", text)
    with pytest.raises(
        moegen.BuildError, match=r"there is no stage 'topq'; this layer has gather, topk, .*, expert_up_1 to expert_up_"
    ):
        _assembly(todo, "topq")


# ---------------------------------------------------------------- numbers: every height and every split

# name -> layer, whether bfloat16 pairs stay as they are, largest tile (None: the default one)
CASES: dict[str, tuple[dict[str, Any], bool, int | None]] = {
    "float32": ({"dtype": "float32", "hidden": 1000, "intermediate": 33}, True, None),
    "float32-ungated": ({"dtype": "float32", "hidden": 200, "intermediate": 72, "activation": "relu2"}, True, 3),
    "bfloat16": ({"dtype": "bfloat16", "hidden": 200, "intermediate": 72}, True, None),
    "bfloat16-ungated": ({"dtype": "bfloat16", "hidden": 1500, "intermediate": 33, "activation": "relu"}, True, 2),
    "bfloat16-long": ({"dtype": "bfloat16", "hidden": 72, "intermediate": 1100, "expert_bias": True}, True, 2),
    "bfloat16-widened": ({"dtype": "bfloat16", "hidden": 1000, "intermediate": 33, "activation": "reglu"}, False, 5),
    "bfloat16-widened-ungated": ({"dtype": "bfloat16", "hidden": 200, "intermediate": 72, "activation": "silu"}, False, 2),
    "float16": ({"dtype": "float16", "hidden": 200, "intermediate": 72, "activation": "relu"}, True, None),
    "float16-gated": ({"dtype": "float16", "hidden": 33, "intermediate": 1000}, True, 3),
}


def _case(name: str) -> Plan:
    fields, pairs, max_rows = CASES[name]
    todo = plan(moegen.MoEConfig(experts=1, top_k=1, **fields))
    tiling = todo.geometry.tiling
    if max_rows is not None:
        tiling = dataclasses.replace(tiling, max_rows=max_rows, chunk_rows=4 * max_rows)
    if not pairs:
        tiling = dataclasses.replace(tiling, pair=1, k_block=512)
    most = 3 * tiling.max_rows + 1
    return plan(moegen.MoEConfig(experts=most, top_k=1, **fields), tiling=tiling)


@pytest.fixture(scope="module", params=CASES)
def module(request: pytest.FixtureRequest, store: pathlib.Path) -> moegen.Module:
    """A layer with one expert for each number of rows from 1 to 3 * max_rows + 1."""
    return moegen.load(built_once(store, _case(request.param)).path, threads=2)


def test_the_cases_cover() -> None:
    """Sums in one block and in several, for each type, in both products."""
    plans = {name: _case(name).geometry for name in CASES}
    for dtype in ("float32", "bfloat16"):
        blocks = {g.up.k_blocks > 1 for g in plans.values() if g.config.dtype == dtype}
        assert blocks == {False, True}, dtype
        assert {g.config.gated for g in plans.values() if g.config.dtype == dtype} == {False, True}
    assert {g.down.k_blocks > 1 for g in plans.values()} == {False, True}
    assert {g.up.k_blocks > 1 for g in plans.values() if g.tiling.pair == 1 and g.config.dtype == "bfloat16"} == {False, True}
    if plan(moegen.MoEConfig(experts=1, top_k=1, hidden=16, dtype="bfloat16")).geometry.tiling.pair == 2:
        assert {g.up.k_blocks > 1 for g in plans.values() if g.tiling.pair == 2} == {False, True}
        assert any(g.tiling.pair == 2 and g.down.k_blocks > 1 for g in plans.values())


def _routed(config: moegen.MoEConfig, rng: np.random.Generator) -> np.ndarray:
    """Expert e is wanted by e + 1 tokens, in any order."""
    return rng.permutation(np.repeat(np.arange(config.experts), np.arange(config.experts) + 1))[:, None]


def test_every_number_of_rows(module: moegen.Module, rng: np.random.Generator) -> None:
    """All heights and splits in one batch, and each alone: right, and the same bits for any threads and any batch."""
    config = module.config
    weights = reference.random_weights(config, rng)
    layer = module.bind(weights)
    ids = _routed(config, rng)
    factors = rng.standard_normal(ids.shape).astype(np.float32)
    x = tokens(config, len(ids), rng)
    got = layer.experts(stored(x, config.dtype), ids, factors)
    assert_close(config, values(got), reference.experts(config, weights, x, ids, factors))
    for threads in (1, 3):
        other = module.bind(weights, threads=threads).experts(stored(x, config.dtype), ids, factors)
        np.testing.assert_array_equal(bits(other), bits(got), f"{threads} threads")
    for e in range(config.experts):
        mine = np.flatnonzero(ids[:, 0] == e)
        for some in (mine, mine[-1:]):
            part = layer.experts(stored(x[some], config.dtype), ids[some], factors[some])
            np.testing.assert_array_equal(bits(part), bits(got)[some], f"{len(some)} of {e + 1} tokens of expert {e}")


@pytest.mark.parametrize("poison", [np.nan, np.inf, "huge"])
def test_sick_tokens_stay_alone_at_every_height(poison: Any, module: moegen.Module, rng: np.random.Generator) -> None:
    """Token 0 is what rows of padding are filled with; it, or any other, is NaN or infinite, or makes hidden values infinite.

    All other tokens keep their bits, whatever the number of rows and so of padded ones.
    """
    config = module.config
    layer = module.bind(reference.random_weights(config, rng))
    value = {"float32": 3e38, "bfloat16": 3e38, "float16": 6e4}[config.dtype] if poison == "huge" else poison
    for count in range(1, config.experts + 1):
        x = tokens(config, count + 1, rng)  # the last token is another expert's
        ids = np.full((count + 1, 1), int(rng.integers(config.experts)))
        ids[-1] = (ids[0] + 1) % config.experts
        factors = np.ones(ids.shape, np.float32)
        clean = layer.experts(stored(x, config.dtype), ids, factors)
        for sick in {0, int(rng.integers(count))}:
            dirty = x.copy()
            if poison == "huge":
                dirty[sick] = np.copysign(value, dirty[sick])
            else:
                dirty[sick, rng.integers(config.hidden)] = value
            got = layer.experts(stored(dirty, config.dtype), ids, factors)
            healthy = np.arange(count + 1) != sick
            np.testing.assert_array_equal(bits(got)[healthy], bits(clean)[healthy], f"{count} rows, token {sick} is sick")
            alone = layer.experts(stored(dirty[sick : sick + 1], config.dtype), ids[sick : sick + 1], factors[:1])
            np.testing.assert_array_equal(values(got)[sick], values(alone)[0], "nor do rows of padding add to it")
            assert not np.isnan(value) or np.isnan(values(got)[sick]).all()


def test_a_sick_token_in_the_whole_layer(store: pathlib.Path, rng: np.random.Generator) -> None:
    """Router included, for bfloat16, with padded rows: a NaN in token 0 leaves all others as they are."""
    config = moegen.MoEConfig(experts=3, top_k=2, hidden=40, intermediate=24, dtype="bfloat16", shared_intermediate=24)
    layer = moegen.load(built_with(store, config, max_rows=3).path, threads=2).bind(reference.random_weights(config, rng))
    for count in range(1, 17):
        x = tokens(config, count, rng)
        clean = layer(stored(x, config.dtype))
        dirty = x.copy()
        dirty[0, rng.integers(config.hidden)] = np.nan
        got = layer(stored(dirty, config.dtype))
        np.testing.assert_array_equal(bits(got)[1:], bits(clean)[1:])
        assert np.isnan(values(got)[0]).all()
