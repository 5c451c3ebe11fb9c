"""The CUDA target: what is compiled, machine code for several architectures, and whole artifacts above an emulated driver."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, built_once, environment, stored
from helpers import tokens as drawn
from moegen.schedules.cuda import few, route, tiling

import moegen
from moegen import compiler as tvm_side
from moegen import reference
from moegen.arrays import HostArray, to_float32
from moegen.cli import main
from moegen.cuda import compiler, emission, emulated_driver, making, nvidia, planning, proof, sass
from moegen.cuda.architectures import parse
from moegen.cuda.emulator import Emulated
from moegen.cuda_geometry import CudaGeometry
from moegen.errors import BuildError, ScheduleError, TargetError
from moegen.verification import verify

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")
LAYER = moegen.MoEConfig(
    experts=6, top_k=2, hidden=80, intermediate=72, dtype="bfloat16", expert_bias=True, shared_intermediate=40, shared_gate=True
)
MOST_SHARED_BYTES = 227 * 1024


def lowered(config: moegen.MoEConfig, folder: pathlib.Path, only: str = "", tf32: bool = False, **knobs: Any) -> Any:
    """The CUDA source of a layer's stages whose name matches."""
    todo = planning.plan(config, "sm_80", tf32=tf32)
    stages = dict(tvm_side.load_module(todo.te_source, folder / "te_source.py").stages())
    wanted = {name: stage for name, stage in stages.items() if re.match(only, name)}
    return compiler.lower(wanted, todo.geometry, {**todo.knobs, **knobs}, parse(["sm_80"]), tf32)


def test_a_shared_gate_goes_with_any_activation(tmp_path: pathlib.Path) -> None:
    """Its sigmoid is not the activation's."""
    config = moegen.MoEConfig(
        experts=4, top_k=2, hidden=64, intermediate=64, activation="relu", shared_intermediate=64, shared_gate=True
    )
    todo = planning.plan(config, "sm_80")
    assert "combine" in dict(tvm_side.load_module(todo.te_source, tmp_path / "te_source.py").stages())


# ---------------------------------------------------------------- machine code


@pytest.mark.parametrize(
    ("fields", "only", "names"),
    [
        (
            {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 2880, "expert_bias": True, "activation": "swiglu_clamped"},
            "(?!losses)",
            ARCHITECTURES,
        ),
        ({"experts": 8, "top_k": 2, "hidden": 224, "intermediate": 704, "dtype": "float32"}, "(up|down)_", ("sm_90",)),
        # 32 steps of 16 loads, which the compiler would all begin at once
        (
            {"experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 1024, "dtype": "float32"},
            "(up|down)_few",
            ("sm_80", "sm_90"),
        ),
    ],
    ids=["bfloat16", "float32", "few"],
)
def test_default_kernels_spill_nothing(tmp_path: pathlib.Path, fields: dict[str, Any], only: str, names: tuple[str, ...]) -> None:
    config = moegen.MoEConfig(**{"dtype": "bfloat16", **fields})
    program = lowered(config, tmp_path, only)
    compiled = nvidia.compile_kernels(program.source, parse(names), tmp_path)
    assert {cubin.architecture.name for cubin in compiled.cubins} == set(names)
    for cubin in compiled.cubins:
        assert set(cubin.resources) >= {"up_few_kernel", "down_few_kernel"}
        assert "few" in only or set(cubin.resources) >= {"up_16_kernel", "up_64_kernel", "up_128_kernel"}
        assert ("route_kernel" in cubin.resources) == (config.dtype == "bfloat16")
        for kernel, used in cubin.resources.items():
            assert (cubin.spilled_bytes[kernel], used.stack_bytes) == (0, 0), (cubin.architecture, kernel)
            launched = next((k for s in program.stages.values() for k in s.kernels if k.symbol == kernel), None)
            if launched is not None:
                assert used.registers * launched.threads <= cubin.architecture.registers_per_sm
                assert launched.shared_bytes <= cubin.architecture.max_shared_bytes_per_block
        counts = {kernel: sass.count_instructions(text) for kernel, text in sass.disassemble(cubin.code).items()}
        for kernel, count in counts.items():
            assert not sass.of_family(count, "LDL"), kernel
            assert not sass.of_family(count, "STL"), kernel
            if re.fullmatch(r"(up|down|router)_\d+_kernel", kernel):
                assert sass.of_family(count, "LDGSTS") > 0, kernel
                assert (sass.of_family(count, "HMMA") > 0) == (config.dtype == "bfloat16"), kernel
                assert (sass.of_family(count, "LDSM") > 0) == (config.dtype == "bfloat16"), kernel


def test_tf32_takes_tensor_cores_for_the_experts_alone(tmp_path: pathlib.Path) -> None:
    config = moegen.MoEConfig(experts=8, top_k=2, hidden=128, intermediate=128, dtype="float32")
    program = lowered(config, tmp_path, "(up|router)_64", tf32=True)
    cubin = nvidia.compile_kernels(program.source, parse(["sm_80"]), tmp_path).cubins[0]
    counts = {kernel: sass.count_instructions(text) for kernel, text in sass.disassemble(cubin.code).items()}
    assert any("TF32" in name for name in counts["up_64_kernel"])
    assert not sass.of_family(counts["router_64_kernel"], "HMMA"), "near ties of logits are decided by float32"
    with pytest.raises(TargetError, match="float32 layers"):
        planning.plan(LAYER, tf32=True)


def test_weights_beyond_32_bits_are_addressed_with_64(tmp_path: pathlib.Path) -> None:
    """DeepSeek-V3's gate and up projections have 7.5e9 elements."""
    config = moegen.MoEConfig(experts=256, top_k=8, hidden=7168, intermediate=2048, dtype="bfloat16")
    source = lowered(config, tmp_path, "(up|down)_16").source
    assert re.search(r"void ptx_cp_async\w*\(void\* dst, int dst_off, void\* src, int64_t src_off\)", source)
    assert not re.search(r"void\* src, int src_off", source)
    assert "int64_t)29360128" in source  # elements of one expert
    assert CudaGeometry(config).up.shape == (256, 2, 2048, 7168)


def test_legality_comes_before_compiling(tmp_path: pathlib.Path) -> None:
    geometry = CudaGeometry(moegen.MoEConfig(experts=8, top_k=2, hidden=256, intermediate=256, dtype="bfloat16"))
    up = geometry.up
    good = tiling.default(64, up, 2, MOST_SHARED_BYTES)
    tiling.check(good, up, 2, MOST_SHARED_BYTES)
    for change, reason in (
        ({"rows": 24}, "multiple of 16"),
        ({"columns": 96}, "must divide"),
        ({"columns": 8, "column_warps": 2}, "multiple of 8"),
        ({"terms": 48}, "64 or 128 bytes"),
        ({"stages": 9}, "between 2 and 8"),
        ({"row_warps": 1, "column_warps": 1, "columns": 128}, "sums"),
        ({"columns": 128, "rows": 128, "row_warps": 4, "column_warps": 4, "stages": 8}, "shared memory"),
    ):
        with pytest.raises(ScheduleError, match=reason):
            tiling.check(dataclasses.replace(good, **change), up, 2, MOST_SHARED_BYTES)
    with pytest.raises(ScheduleError, match="columns=5"):
        few.check(few.Knobs(columns=5))
    for rows in tiling.ROWS:
        found = tiling.space(rows, up, 2, MOST_SHARED_BYTES)
        assert tiling.default(rows, up, 2, MOST_SHARED_BYTES) in found
        assert len(found) > 8
    small = tiling.default(128, up, 2, 99 * 1024)  # sm_86, sm_89, sm_120
    tiling.check(small, up, 2, 99 * 1024)
    with pytest.raises(ScheduleError, match="shared memory"):
        lowered(geometry.config, tmp_path, "up_128", up_128=dataclasses.replace(small, stages=8))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("rows", [16, 64])
def test_dispatch_makes_blocks_of_one_expert(tmp_path: pathlib.Path, rows: int) -> None:
    config = moegen.MoEConfig(experts=7, top_k=3, hidden=64, intermediate=64, dtype="bfloat16")
    source = "#include <cstdint>\n" + emission.dispatch_source(config)
    emulated = Emulated(source, tmp_path)
    rng = np.random.default_rng()
    for tokens, capacity in ((0, 9), (1, 9), (90, 10**6), (90, 20)):
        ids = rng.choice(config.experts, (tokens, 3), p=[0.6, 0.3, 0.02, 0.02, 0.02, 0.04, 0.0]).astype(np.int32)
        ids[rng.random(ids.shape) < 0.02] = rng.choice([-1, 7, 2**30])
        weights = rng.random(ids.shape).astype(np.float32)
        choices, blocks = ids.size, min(7, ids.size) + ids.size // rows
        token, slot = (np.full(blocks * rows + 1, -99, np.int32) for _ in range(2))
        weight = np.full(blocks * rows + 1, np.nan, np.float32)
        expert, kept = np.full(blocks + 1, -99, np.int32), np.full(choices + 1, -99, np.int32)
        used, load, dropped = np.zeros(1, np.int32), np.zeros(7, np.int32), np.full(1, np.nan)
        args = [ids, weights, choices, capacity, rows, blocks, token, slot, weight, expert, kept, used, load, dropped]
        emulated.launch("dispatch_kernel", 7, 256, args, order="shuffled", seed=int(rng.integers(2**31)))
        flat, at = ids.reshape(-1), 0
        assert np.array_equal(load, [(flat == e).sum() for e in range(7)])
        expected = np.where((flat >= 0) & (flat < 7), 0, -1)
        for e in range(7):
            mine = np.flatnonzero(flat == e)[:capacity]
            expected[mine] = 1
            needed = -(-len(mine) // rows)
            assert np.array_equal(expert[at : at + needed], [e] * needed)
            here = slice(at * rows, (at + needed) * rows)
            padded = np.full(needed * rows, -1)
            padded[: len(mine)] = mine
            assert np.array_equal(slot[here], padded)
            assert np.array_equal(token[here], np.where(padded < 0, -1, padded // 3))
            assert np.array_equal(weight[here][: len(mine)], weights.reshape(-1)[mine])
            at += needed
        assert used[0] == at
        assert (expert[at:blocks] == -1).all()
        assert np.array_equal(kept[:choices], expected)
        assert (expert[blocks], kept[choices], token[-1], slot[-1]) == (-99, -99, -99, -99), "nothing beyond the tables"
        assert dropped[0] == sum(max(0, (flat == e).sum() - capacity) for e in range(7))


@pytest.mark.parametrize("terms", [64, 32])
def test_fragments_are_read_without_bank_conflicts(tmp_path: pathlib.Path, terms: int) -> None:
    """One tiled product alone; where the swizzle of one side is left out, numbers are wrong, and reads wait for one another."""
    config = moegen.MoEConfig(experts=3, top_k=1, hidden=192, intermediate=128, dtype="bfloat16", activation="relu")
    tile = dataclasses.replace(tiling.default(64, CudaGeometry(config).up, 2, MOST_SHARED_BYTES), terms=terms)
    program = lowered(config, tmp_path, "up_64", up_64=tile)
    (kernel,) = program.stages["up_64"].kernels
    rng = np.random.default_rng(7)
    w, x = rng.standard_normal((3, 128, 192)), rng.standard_normal((70, 192))
    token, expert = rng.integers(0, 70, (3, 64), np.int32), np.array([2, -1, 0], np.int32)
    output = np.zeros((3, 64, 128), np.uint16)
    x16, w16 = stored(x, "bfloat16"), stored(w, "bfloat16")
    held = {"w": w16.data, "x": x16.data, "token": token, "expert": expert, "output": output, "B": 3}
    exact = np.maximum(to_float32(x16)[token] @ to_float32(w16)[expert].transpose(0, 2, 1), 0)
    swizzle = "chunk ^ row / (128 / kRowBytes)"
    for source, right in ((program.source, True), (program.source.replace(swizzle, "chunk"), False)):
        emulated = Emulated(source, tmp_path / str(right), arch="sm_80")
        output[:] = stored(np.full(output.shape, np.nan), "bfloat16").data
        arguments = [held[parameter.name] for parameter in kernel.parameters]
        grid = [int(extent.replace("B", "3")) for extent in kernel.grid]
        emulated.launch(kernel.symbol, grid, kernel.block, arguments, kernel.shared_bytes, order="shuffled", seed=5)
        made = to_float32(HostArray(output, "bfloat16"))
        assert np.allclose(made[[0, 2]], exact[[0, 2]], rtol=0.01, atol=0.1) == right
        assert np.isnan(made[1]).all(), "a block without an expert has nothing to do"
        assert (emulated.bank_conflicts() == 0) == right


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 300, "top_k": 12, "hidden": 100, "gating": "sigmoid", "correction_bias": True, "n_group": 3, "topk_group": 2},
        {"experts": 5, "top_k": 2, "hidden": 33, "router_bias": True, "shared_intermediate": 64, "shared_gate": True},
        {"experts": 1, "top_k": 1, "hidden": 64},
    ],
    ids=lambda fields: f"E{fields['experts']}",
)
def test_routing_in_one_launch(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    """As float64 has it, and as two launches choose: with ties, a token whose logits are all equal, and one that is NaN."""
    config = moegen.MoEConfig(intermediate=64, dtype="bfloat16", **fields)
    program = lowered(config, tmp_path, "router_few|topk")
    emulated, geometry = Emulated(program.source, tmp_path, arch="sm_80"), CudaGeometry(config)
    rng, experts = np.random.default_rng(5), config.experts
    weights = reference.random_weights(config, rng)
    if experts > 4:
        weights["router.weight"][[2, experts - 1]] = weights["router.weight"][0]
    x = drawn(config, 4, rng)
    x[2] = 0
    packed = np.zeros(geometry.router.shape[2:], np.float32)
    packed[:experts, : config.hidden] = weights["router.weight"]
    bias = np.zeros(geometry.router.n_padded, np.float32)
    bias[:experts] = weights.get("router.bias", 0)
    x[3] = np.nan
    found = {}
    for launches in (["route"], ["router_few", "topk"]):
        ids, shares = np.full((5, config.top_k), -99, np.int32), np.full((5, config.top_k), -99, np.float32)
        logits = np.full((4, geometry.router.n_padded), np.nan, np.float32)
        given = {"x": stored(x, "bfloat16").data, "w": stored(packed, "bfloat16").data, "bias": bias, "logits": logits, "T": 4}
        given |= {"output": logits, "output.v0": ids, "output.v1": shares, "correction": weights.get("router.correction_bias")}
        for kernel in (kernel for stage in launches for kernel in program.stages[stage].kernels):
            grid = [int(extent.replace("T", "4")) for extent in kernel.grid]
            arguments = [given[parameter.name] for parameter in kernel.parameters]
            emulated.launch(kernel.symbol, grid, kernel.block, arguments, order="shuffled", seed=int(rng.integers(2**31)))
        assert (ids[4] == -99).all(), "nothing beyond the tokens"
        found[len(launches)] = ids[:4], shares[:4], logits
    (ids, shares, logits), (two_ids, two_shares, two_logits) = found[1], found[2]
    assert np.array_equal(ids, two_ids)
    exact = x[:3].astype(np.float64) @ weights["router.weight"].T.astype(np.float64) + weights.get("router.bias", 0)
    for made, share in ((logits, shares), (two_logits, two_shares)):
        np.testing.assert_allclose(made[:3, :experts], exact, rtol=1e-5, atol=1e-6)
        expected = reference.route(config, weights, x[:3], made[:3, :experts])
        assert np.array_equal(ids[:3], expected.ids)
        np.testing.assert_allclose(share[:3], expected.weights, rtol=1e-5)
    if config.n_group == 1:
        assert np.array_equal(ids[3], np.arange(config.top_k)), "NaN is last, and ties go to the lower index"


def test_what_cannot_be_one_launch_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ScheduleError, match="not one size"):
        lowered(LAYER, tmp_path, "(shared_)?up_few", shared_up_few=few.Knobs(columns=8))
    with pytest.raises(ScheduleError, match="lanes=12 must be a power of two up to 16"):
        lowered(LAYER, tmp_path, "router_few|topk", route=route.Knobs(columns=8, lanes=12, unroll=4))


def test_a_large_router_is_read_by_many_thread_blocks() -> None:
    for experts, hidden, most in ((8, 4096, 128), (64, 2048, 128), (128, 2048, 0), (256, 7168, 0)):
        config = moegen.MoEConfig(experts=experts, top_k=8, hidden=hidden, dtype="bfloat16")
        assert planning.plan(config).route_tokens == most


@pytest.fixture(scope="module")
def store(store: pathlib.Path) -> pathlib.Path:
    """One for all processes of pytest-xdist, with nothing but this file's."""
    return store / "cuda"


@pytest.fixture(scope="module")
def emulated(store: pathlib.Path) -> Iterator[pathlib.Path]:
    """One folder for what is compiled for the emulator, proofs included: the same kernels are not compiled again."""
    folder, made = store / "emulated", emulated_driver.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof.emulated_driver, "environment", lambda source, _, **how: made(source, folder, **how))
        yield folder


@pytest.fixture(scope="module")
def built(store: pathlib.Path, emulated: pathlib.Path) -> moegen.Artifact:
    """`LAYER` for two architectures, as the command line builds it."""
    return built_once(store, planning.plan(LAYER, "sm_80,sm_90"), verify=True)


def test_build_proves_itself_without_a_device(built: moegen.Artifact) -> None:
    report = built.verification()
    assert report["status"] == "passed"
    assert report["executed"] in ("emulated sm_90", "on the device")
    assert {case["tokens"] for case in report["cases"]} >= {0, 1, 2, 17}
    assert {p.name for p in built.path.iterdir()} >= {
        "moe.so",
        "kernels.cu",
        "kernels.ptx",
        "kernels.sm_80.cubin",
        "kernels.sm_90.cubin",
    }
    assert built.target.gpus == ("sm_90", "sm_80")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", built.library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\bcu(da)?[A-Z]\w+", symbols), "neither the driver nor CUDA's runtime is linked"
    needed = subprocess.run(["readelf", "-d", built.library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|libtvm_runtime|libtvm\.so|stdc\+\+)", needed)


def test_calls_on_an_emulated_device(built: moegen.Artifact, emulated: pathlib.Path) -> None:
    source = (built.path / making.KERNELS).read_text(encoding="utf-8")
    around = emulated_driver.environment(source, emulated, arch="sm_90", order="shuffled", seed=3)
    around["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, str(ROOT / "tests" / "cuda_calls.py"), str(built.path)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = "host packed device into launches routing experts jitter bare torch ragged nan errors empty"
    assert done.stdout.split() == words.split()


# Fields, numbers of tokens, heights of row blocks, tokens up to which routing is one launch (None: the default), and launches for
# one token.
VARIANTS = {
    "high blocks": (
        {"experts": 2, "top_k": 1, "hidden": 64, "intermediate": 128, "dtype": "float16", "activation": "gelu"},
        (1, 17, 50, 200), (16, 64, 128), None, 3,
    ),
    "odd float32": (
        {
            "experts": 5, "top_k": 3, "hidden": 33, "intermediate": 7, "dtype": "float32", "capacity_factor": 1.0,
            "router_bias": True,
        },
        (0, 1, 40), (64,), 8, 6,  # tokens are padded and sorted where capacity drops choices
    ),
    "groups": (
        {
            "experts": 16, "top_k": 4, "hidden": 64, "intermediate": 96, "dtype": "bfloat16", "gating": "sigmoid",
            "correction_bias": True, "n_group": 4, "topk_group": 2, "routed_scaling": 2.5, "shared_intermediate": 48,
        },
        (0, 1, 3, 60), (16,), 0, 4,  # as for a router of more weights
    ),
    "top 1": (
        {"experts": 3, "top_k": 1, "hidden": 100, "intermediate": 24, "dtype": "bfloat16", "weight_on_input": True},
        (1, 30), (128,), None, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_reference(name: str, store: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, tokens, rows, route_tokens, launches = VARIANTS[name]
    monkeypatch.setattr(proof, "emulated_cases", lambda *about: tokens)
    todo = planning.default_plan(moegen.MoEConfig(**fields), planning.resolve_target("sm_80"), rows)
    if route_tokens is not None:
        todo = dataclasses.replace(todo, route_tokens=route_tokens)
    report = moegen.build(todo, out=store).verification()
    assert report["status"] == "passed"
    assert {case["tokens"] for case in report["cases"]} == set(tokens)
    if not proof.devices():
        assert {case["launches"] for case in report["cases"] if case["tokens"] == 1} == {launches}


def test_tf32_is_as_exact_as_it_can_be(store: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "emulated_cases", lambda *about: (2, 40))
    config = moegen.MoEConfig(experts=4, top_k=2, hidden=64, intermediate=64, dtype="float32")
    made = moegen.build(config, "cuda", store, arch="sm_80", tf32=True)
    report = made.verification()
    assert report["status"] == "passed"
    assert 1e-5 < report["worst_relative_l2"] < 5e-3
    assert "tf32" in made.name


def test_a_wrong_kernel_is_not_published(store: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `up` that forgets the activation's second factor."""
    source = emission.te_source

    def broken(*args: Any) -> str:
        text = source(*args)
        assert ") * (total[b, m, i64(1), n]" in text
        return text.replace(") * (total[b, m, i64(1), n]", ") * (f32(2.0) + total[b, m, i64(1), n]")

    monkeypatch.setattr(emission, "te_source", broken)
    monkeypatch.setattr(proof, "emulated_cases", lambda *about: (20,))
    config = moegen.MoEConfig(experts=4, top_k=2, hidden=64, intermediate=64, dtype="float16", gating="sigmoid")
    with pytest.raises(moegen.VerificationError, match="relative L2"):
        moegen.build(planning.default_plan(config, planning.resolve_target("sm_80"), (16,)), out=store)
    assert not list(store.glob("*-float16-sigmoid*"))


def test_large_layers_say_that_they_were_not_proven() -> None:
    assert proof.emulated_cases(moegen.MoEConfig(experts=8, top_k=2, hidden=512)) != ()
    large = moegen.MoEConfig(experts=64, top_k=8, hidden=2048, intermediate=1024)
    assert max(proof.emulated_cases(large)) < 17, "row blocks would have no rows"
    assert proof.blocks_of(large, (0, 1)) == (("all_to_one", 17),)
    assert proof.blocks_of(large, (0, 17)) == ()
    assert proof.emulated_cases(moegen.MoEConfig(experts=8, top_k=8, hidden=16384, intermediate=65536)) == ()


# ---------------------------------------------------------------- users


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_command_line(built: moegen.Artifact, store: pathlib.Path) -> None:
    options = ["--out", str(store)]
    shown = run("inspect", built.name, *options)
    assert shown.exit_code == 0, shown.output
    assert "cuda -arch=sm_90,sm_80" in shown.output
    if not proof.devices():
        assert "no, missing: a CUDA device" in shown.output
        assert "verified emulated sm_90 (worst relative L2" in shown.output
    resources = run("inspect", built.name, *options, "--resources", "--kernel", "up")
    assert resources.exit_code == 0
    assert re.search(r"^up_64_kernel +128 +\d+ +\d+ +\d+ +0 +0 +\d+$", resources.output, re.MULTILINE), resources.output
    assert "topk_kernel" not in resources.output
    as_json = json.loads(run("inspect", built.name, *options, "--resources", "--json").output)
    assert as_json["sm_80"]["dispatch_kernel"]["spilled_bytes"] == 0
    assert 'extern "C" __global__' in run("inspect", built.name, *options, "--cuda-source").output
    assert ".target sm_80" in run("inspect", built.name, *options, "--ptx").output
    code = run("inspect", built.name, *options, "--sass", "--kernel", "up_16").output
    assert "HMMA" in code
    assert "// sm_80 up_16_kernel" in code
    listed = run("list", *options)
    assert "sm_90-sm_80" in listed.output
    emitted = run("emit", "--experts", "4", "--top-k", "2", "--hidden", "64", "--target", "cuda")
    assert "def up_few():" in emitted.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--arch", "sm_70"], "too old"),
        (["--arch", "sm_91"], "unknown"),
        (["--arch", "x86_64"], "expected a name such as sm_80"),
        (["--mcpu", "znver5"], "mcpu='znver5' is for target llvm"),
        (["--weight-dtype", "int8"], "few bits"),
        (["--tf32", "--dtype", "bfloat16"], "tf32 is for float32"),
    ],
)
def test_wrong_builds_are_refused_in_a_sentence(arguments: list[str], reason: str, tmp_path: pathlib.Path) -> None:
    done = run("build", "--experts", "4", "--top-k", "2", "--hidden", "64", "--target", "cuda", "--out", str(tmp_path), *arguments)
    assert done.exit_code == 1
    assert reason in done.output
    assert not list(tmp_path.iterdir())


def test_cuda_options_are_not_for_cpus(tmp_path: pathlib.Path, built: moegen.Artifact, store: pathlib.Path) -> None:
    done = run("build", "--experts", "2", "--top-k", "1", "--hidden", "16", "--tf32", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "tf32 is for target cuda" in done.output
    done = run("build", "--experts", "2", "--top-k", "1", "--hidden", "16", "--arch", "sm_90", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "arch='sm_90' must be one of" in done.output


def test_a_device_with_less_shared_memory_is_told_so(built: moegen.Artifact, emulated: pathlib.Path) -> None:
    """Machine code for sm_80 runs on sm_86, whose 99 KiB of shared memory for a block are enough; with less it would not be."""
    source = (built.path / making.KERNELS).read_text(encoding="utf-8")
    around = emulated_driver.environment(source, emulated, arch="sm_86")
    script = (
        "import sys, moegen\ntry: moegen.load(sys.argv[1]); print('loaded')\nexcept moegen.ArtifactError as error: print(error)"
    )
    around["PYTHONPATH"] = environment()["PYTHONPATH"]
    command = [sys.executable, "-c", script, built.path]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=True)
    assert done.stdout == "loaded\n"
    around["MOEGEN_EMULATED_SHARED_BYTES"] = "65536"
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=True)
    assert re.search(r"takes \d+ bytes of shared memory; sm_86 has 65536: build it with --arch sm_86", done.stdout), done.stdout


def test_without_a_device_loading_says_so(built: moegen.Artifact) -> None:
    if proof.devices():
        pytest.skip("there is a CUDA device")
    with pytest.raises(moegen.ArtifactError, match="no NVIDIA driver"):
        moegen.load(built.path)


def test_an_edited_module_is_built(built: moegen.Artifact, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (built.path / "te_source.py").read_text(encoding="utf-8")
    edited = tmp_path / "edited.py"
    edited.write_text(
        text.replace("TILING = {'rows': [16, 64, 128]}", "TILING = {'rows': [16]}").replace("(16, 64, 128,)", "(16,)")
    )
    todo = planning.plan_from_source(edited, "sm_80")
    assert {regime.rows for regime in todo.regimes} == {16}
    monkeypatch.setattr(proof, "emulated_cases", lambda *about: (30,))
    made = moegen.build(todo, out=tmp_path / "store")
    assert made.verification()["status"] == "passed"
    assert not any(stage.endswith("_64") and stage != "router_64" for stage in made.manifest["stages"])
    edited.write_text(text.replace("TILING", "TILES"))
    with pytest.raises(BuildError, match="CONFIG or TILING"):
        planning.plan_from_source(edited)


def test_the_proof_can_be_repeated(built: moegen.Artifact) -> None:
    if proof.devices():
        pytest.skip("there is a CUDA device, on which other tests prove")
    done = run("verify", str(built.path), "--seed", "11")
    assert done.exit_code == 0, done.output
    assert "emulated sm_90" in done.output
    with pytest.raises(moegen.ArtifactError, match="no NVIDIA driver"):
        verify(built)
