"""NVIDIA's architectures and compilers: no GPU is needed, and no driver. Kernels are tiny, and each compiler compiles them once."""

from __future__ import annotations

import collections
import ctypes
import pathlib
import re
import subprocess

import pytest

from moegen.cuda import cubins, embedding, nvidia, sass, wheels
from moegen.cuda.architectures import KNOWN, Architecture, choose, parse
from moegen.errors import BuildError, TargetError
from moegen.toolchain import cxx

SM_80, SM_90A = KNOWN["sm_80"], KNOWN["sm_90a"]

# `squeezed` may use 32 registers on both architectures and needs more; `product` has what moegen's kernels are made of.
SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

extern "C" __global__ void __launch_bounds__(256, 1) reversed_block(float* x) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = 1.0f / s[255 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(1024, 2) squeezed(float* x) {
  float a[60];
#pragma unroll
  for (int i = 0; i < 60; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 60; ++i) x[i * 1024 + threadIdx.x] = a[i] * a[59 - i];
}

extern "C" __global__ void product(const unsigned* __restrict__ ab, float* c, __nv_bfloat16* y, int n) {
  extern __shared__ uint4 shared[];
  const unsigned at = (unsigned)__cvta_generic_to_shared(shared + threadIdx.x);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(ab + 4 * threadIdx.x));
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  unsigned a[4], b[2] = {ab[n], ab[n + 1]};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; ++i) c[4 * threadIdx.x + i] = d[i];
  y[threadIdx.x] = __float2bfloat16(d[0]);
}
"""


def _toolchain(name: str, monkeypatch: pytest.MonkeyPatch) -> nvidia.Toolchain:
    if name == "nvcc" and not nvidia.tool("nvcc"):
        pytest.skip("there is no nvcc")
    if name == "nvrtc" and not wheels.find("nvidia-cuda-nvrtc", "libnvrtc.so.*"):
        pytest.skip(f"there is no NVRTC: {wheels.ADVICE}")
    monkeypatch.setenv("MOEGEN_NVCC", name)
    return nvidia.find()


@pytest.fixture(scope="module", params=["nvcc", "nvrtc"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nvidia.Compiled:
    with pytest.MonkeyPatch.context() as patch:
        toolchain = _toolchain(request.param, patch)
    folder = tmp_path_factory.mktemp(request.param)
    return nvidia.compile_kernels(SOURCE, (SM_90A, SM_80), folder, ptx_for=SM_80, toolchain=toolchain)


# Architectures


def test_architectures_come_in_the_order_of_preference() -> None:
    assert parse(["sm_80", "sm_90", "sm_90a", "sm_80"]) == (SM_90A, KNOWN["sm_90"], SM_80)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no architecture to compile for"),
        (["compute_80"], "'compute_80': expected a name such as sm_80 or sm_90a"),
        (["sm_80", "90"], "'90': expected a name"),
        (["sm_75"], "'sm_75' is too old: kernels need cp.async and mma.sync of bfloat16, which begin with sm_80"),
        (["sm_81"], "'sm_81' is unknown"),
        (["sm_80a"], "'sm_80a' is unknown"),
        (["sm_250"], "'sm_250' is unknown"),
    ],
)
def test_a_bad_name_is_refused_with_those_that_are_known(names: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)) as caught:
        parse(names)
    assert str(caught.value).endswith(f"known are {', '.join(KNOWN)}")


DEVICES = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("sm_86", [(8, 6), (8, 9)]),
        ("sm_87", [(8, 7)]),
        ("sm_90", [(9, 0)]),
        ("sm_90a", [(9, 0)]),
        ("sm_100", [(10, 0), (10, 3)]),
        ("sm_100a", [(10, 0)]),
        ("sm_120", [(12, 0), (12, 1)]),
    ],
)
def test_machine_code_runs_within_its_major_version(name: str, devices: list[tuple[int, int]]) -> None:
    assert [device for device in DEVICES if KNOWN[name].runs_on(device)] == devices


def test_ptx_runs_on_what_is_newer() -> None:
    assert [device for device in DEVICES if SM_80.ptx_runs_on(device)] == DEVICES[1:]
    assert [device for device in DEVICES if SM_90A.ptx_runs_on(device)] == [(9, 0)]
    assert (SM_80.virtual, SM_90A.virtual) == ("compute_80", "compute_90a")


@pytest.mark.parametrize(
    ("device", "expected"), [((8, 0), "sm_80"), ((8, 9), "sm_86"), ((8, 7), None), ((9, 0), "sm_90a"), ((12, 0), None)]
)
def test_a_device_takes_the_code_closest_to_it(device: tuple[int, int], expected: str | None) -> None:
    chosen = choose(parse(["sm_80", "sm_86", "sm_90", "sm_90a"]), device)
    assert (chosen and chosen.name) == expected


def test_limits() -> None:
    assert SM_80.max_shared_bytes_per_block == 163 * 1024
    assert KNOWN["sm_90"].max_shared_bytes_per_block == 227 * 1024 == 232448
    assert KNOWN["sm_120"].max_shared_bytes_per_block == 99 * 1024
    assert [name for name, one in KNOWN.items() if one.has_wgmma] == ["sm_90a"]
    assert SM_90A.has_tma
    assert KNOWN["sm_120"].has_tma
    assert not KNOWN["sm_89"].has_tma


# Compilers


def test_there_is_a_compiler() -> None:
    """Tests of one that is missing are left out, so one has to be there."""
    assert nvidia.find().name in ("nvcc", "nvrtc")


def test_compiled_for_each_architecture(compiled: nvidia.Compiled) -> None:
    assert [one.architecture for one in compiled.cubins] == [SM_90A, SM_80]
    for one in compiled.cubins:
        assert set(one.resources) == {"reversed_block", "squeezed", "product"}
        assert one.resources["reversed_block"].static_shared_bytes == 1024
        assert one.resources["product"].static_shared_bytes == 0
        assert one.resources["reversed_block"].max_threads == 256
        assert one.resources["product"].max_threads == 0
        assert one.resources["squeezed"].registers == 65536 // (2 * 1024)
        assert one.resources["squeezed"].stack_bytes > 0
        assert one.spilled_bytes["squeezed"] > 0
        assert one.resources["product"].stack_bytes == one.spilled_bytes["product"] == 0
    assert re.search(r"^\.target sm_80$", compiled.ptx, re.MULTILINE)
    assert "cp.async" in compiled.ptx
    assert compiled.ptx_for == SM_80


def test_resources_are_those_that_the_assembler_reports(compiled: nvidia.Compiled) -> None:
    for one in compiled.cubins:
        reports = re.split(r"Compiling entry function '(\w+)'", one.log)
        assert len(reports) == 7
        for kernel, report in zip(reports[1::2], reports[2::2], strict=True):

            def said(what: str, report: str = report) -> int:
                found = re.search(rf"(\d+) {what}", report)
                return int(found[1]) if found else 0

            has = one.resources[kernel]
            assert has.registers == said("registers")
            assert has.static_shared_bytes == said("bytes smem")
            assert has.stack_bytes == said("bytes stack frame")
            assert one.spilled_bytes[kernel] == said("bytes spill stores") + said("bytes spill loads")
            if one.architecture == SM_80:  # of later ones ptxas does not say it
                assert has.constant_bytes == said(r"bytes cmem\[0\]")


def test_instructions(compiled: nvidia.Compiled) -> None:
    for one in compiled.cubins:
        listing = sass.disassemble(one.code)
        assert set(listing) == set(one.resources)
        counted = {kernel: sass.count_instructions(text) for kernel, text in listing.items()}
        for kernel, counts in counted.items():
            assert 16 * counts.total() == one.resources[kernel].code_bytes
        product = counted["product"]
        assert product["HMMA.16816.F32.BF16"] == 1
        assert sass.of_family(product, "HMMA") == 1
        assert sass.of_family(product, "LDSM") == sass.of_family(product, "LDGSTS") == 1
        assert sass.of_family(product, "STL") == 0
        assert sass.of_family(counted["squeezed"], "STL") > 0


def test_families_end_at_a_point() -> None:
    counted = collections.Counter({"LDG.E": 2, "LDGSTS.E.BYPASS.128": 3, "LDGDEPBAR": 1})
    assert sass.of_family(counted, "LDG") == 2


@pytest.mark.parametrize("name", ["nvcc", "nvrtc"])
def test_options_and_mistakes(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = _toolchain(name, monkeypatch)
    source = 'extern "C" __global__ void roots(float* x) { x[threadIdx.x] = sqrtf(1.0f / x[threadIdx.x]); }'
    exact = nvidia.compile_kernels(source, (SM_80,), tmp_path, toolchain=toolchain)
    assert (exact.ptx, exact.ptx_for, exact.compiler) == ("", None, str(toolchain))
    beside = nvidia.compile_kernels(source, (SM_80,), tmp_path, ptx_for=SM_80, toolchain=toolchain)
    assert beside.cubins[0].code == exact.cubins[0].code, "from the PTX or from the source, machine code is the same"
    assert beside.cubins[0].spilled_bytes == exact.cubins[0].spilled_bytes
    fast = nvidia.compile_kernels(source, (SM_80,), tmp_path, fast_math=True, toolchain=toolchain)
    assert fast.cubins[0].resources["roots"].code_bytes < exact.cubins[0].resources["roots"].code_bytes

    with pytest.raises(BuildError, match=r'does not compile the kernels for sm_80: kernels\.cu\(1\): error: .*"oops"') as caught:
        nvidia.compile_kernels("__global__ void f() { oops(); }", (SM_80,), tmp_path, toolchain=toolchain)
    assert str(caught.value).startswith(str(toolchain))
    assert "\n" not in str(caught.value)
    with pytest.raises(BuildError, match=r"for sm_77: .*(?i:arch)"):
        nvidia.compile_kernels(source, (Architecture("sm_77", (7, 7), 0, 0, 0),), tmp_path, toolchain=toolchain)


@pytest.mark.parametrize("name", ["nvcc", "nvrtc"])
def test_the_source_that_tvm_makes_compiles(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its preludes ask which compiler reads them, and include other headers for NVRTC."""
    from tvm import compile as tvm_compile
    from tvm import s_tir, te
    from tvm.target import Target

    toolchain = _toolchain(name, monkeypatch)
    x = te.placeholder((te.var("n"), 512), "bfloat16", name="x")
    y = te.compute(x.shape, lambda i, j: te.sigmoid(x[i, j].astype("float32")).astype("bfloat16"), name="y")
    schedule = s_tir.Schedule(te.create_prim_func([x, y]).with_attr("global_symbol", "activate"))
    rows, columns = schedule.get_loops(schedule.get_sblock("y"))
    _, threads, vector = schedule.split(columns, [None, 128, 4])
    schedule.bind(rows, "blockIdx.x")
    schedule.bind(threads, "threadIdx.x")
    schedule.vectorize(vector)
    source = tvm_compile(schedule.mod, Target({"kind": "cuda", "arch": "sm_80"}, host="llvm")).mod.imports[0].inspect_source()
    made = nvidia.compile_kernels(source, (SM_80,), tmp_path, toolchain=toolchain)
    assert made.cubins[0].resources["activate_kernel"].max_threads == 128


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEGEN_NVCC", raising=False)
    monkeypatch.setattr(nvidia, "tool", lambda name: None)
    monkeypatch.setattr(sass, "tool", lambda name: None)
    monkeypatch.setattr(wheels, "find", lambda distribution, pattern: None)
    with pytest.raises(BuildError, match=r"nvidia-cuda-nvrtc, .* missing\): pip install 'moegen\[cuda\]'"):
        nvidia.find()
    with pytest.raises(BuildError, match=r"needs nvdisasm: pip install 'moegen\[cuda\]'"):
        sass.disassemble(b"")


def test_a_wheel_that_is_not_installed() -> None:
    assert wheels.find("no-such-distribution-of-nvidia", "*") is None
    assert wheels.find("numpy", "no-such-file") is None
    assert wheels.find("numpy", "numpy/version.py")


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("Cuda compilation tools, release 11.8, V11.8.89", "is nvcc 11.8.89, and the oldest that serves is 12.0"),
        ("hello", "does not say which version"),
    ],
)
def test_an_nvcc_that_does_not_serve(says: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvcc"
    program.write_text(f"#!/bin/sh\necho '{says}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("MOEGEN_NVCC", str(program))
    with pytest.raises(BuildError, match=message):
        nvidia.find()
    monkeypatch.setenv("MOEGEN_NVCC", str(tmp_path / "missing"))
    with pytest.raises(BuildError, match=r"\$MOEGEN_NVCC names .*missing, and there is no such program"):
        nvidia.find()


# Machine code


@pytest.mark.parametrize("cut", [0, 10, 100, 5000])
def test_damaged_machine_code_is_refused(cut: int, compiled: nvidia.Compiled) -> None:
    with pytest.raises(BuildError, match=r"cubin is damaged|not machine code for a GPU"):
        cubins.resources(compiled.cubins[0].code[:cut])


def test_other_programs_are_no_machine_code_for_gpus() -> None:
    with pytest.raises(BuildError, match="not machine code for a GPU"):
        cubins.resources(pathlib.Path("/proc/self/exe").read_bytes()[:4096])


def test_embedded_images_are_what_was_embedded(tmp_path: pathlib.Path) -> None:
    images = {"sm_80": bytes(range(256)) * 3 + b"x", "ptx": b".version 9.0"}
    made = embedding.embed(images, tmp_path)
    (tmp_path / "reader.cc").write_text(
        "#include <cstddef>\n"
        + "".join(
            f'extern "C" const char {symbol}[]; extern "C" const char {symbol}_end[];\n'
            f'extern "C" const char* start_{name}() {{ return {symbol}; }}\n'
            f'extern "C" size_t size_{name}() {{ return {symbol}_end - {symbol}; }}\n'
            for name, symbol in ((name, embedding.symbol(name)) for name in images)
        ),
        encoding="utf-8",
    )
    subprocess.run([*cxx(), "-shared", "-fPIC", "reader.cc", str(made), "-o", "reader.so"], cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "reader.so"))
    for name, data in images.items():
        start, size = library[f"start_{name}"], library[f"size_{name}"]
        start.restype, size.restype = ctypes.c_void_p, ctypes.c_size_t
        assert ctypes.string_at(start(), size() + 1) == data + b"\0"
        assert start() % embedding.ALIGN_BYTES == 0
    with pytest.raises(AttributeError):
        library[embedding.symbol("ptx")]
