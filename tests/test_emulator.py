"""The CUDA emulator: what correct kernels compute, and that wrong ones are caught."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT

from moegen.cuda.emulated_driver import environment
from moegen.cuda.emulator import ORDERS, Emulated
from moegen.cuda.guarded import device_array, on_device
from moegen.cuda.translation import translate
from moegen.errors import EmulationError
from moegen.toolchain import cxx

SOURCE = (ROOT / "tests" / "cuda" / "emulated.cu").read_text(encoding="utf-8")
HOPPER = (ROOT / "tests" / "cuda" / "emulated_hopper.cu").read_text(encoding="utf-8")
NO_WAIT, NO_BARRIER, MISALIGNED, EARLY_COPY = 1, 2, 3, 4
# of the product with wgmma
WITHOUT_BARRIER, COPIED_EARLY, FEW_BYTES, WITHOUT_WAIT, WITHOUT_FENCE = 1, 2, 3, 4, 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="session")
def kernels(folder: pathlib.Path) -> Emulated:
    return Emulated(SOURCE, folder)


def _gather_gemm(
    kernels: Emulated, rng: np.random.Generator, sizes: tuple[int, int, int, int], fault: int = 0, **how: Any
) -> float:
    """The largest error of y[m, n] = x[rows[m]] . w[n], relative to the result's rms; NaN when there is one."""
    tokens, count, columns, depth = sizes
    x = on_device(rng.standard_normal((tokens, depth)).astype(ml_dtypes.bfloat16))
    w = on_device(rng.standard_normal((columns, depth)).astype(ml_dtypes.bfloat16))
    rows = on_device(rng.integers(0, tokens, count).astype(np.int32))
    y = device_array((count, columns), np.float32)
    shared = 3 * (32 + 64) * 40 * 2
    grid = (-(-columns // 64), -(-count // 32))
    kernels.launch("gather_gemm", grid, 128, [x, w, rows, y, count, columns, depth, fault], shared, **how)
    exact = x[rows].astype(np.float64) @ w.astype(np.float64).T
    return float(np.abs(y - exact).max() / np.sqrt(np.mean(exact**2)))


@pytest.mark.parametrize("how", [*({"order": order, "seed": 7} for order in ORDERS), {"threads": 2}], ids=str)
def test_gather_gemm(kernels: Emulated, rng: np.random.Generator, how: dict[str, Any]) -> None:
    assert _gather_gemm(kernels, rng, (50, 70, 150, 160), **how) < 1e-5


@pytest.mark.parametrize("sizes", [(1, 1, 1, 32), (3, 33, 65, 64), (9, 31, 64, 352)], ids=str)
def test_gather_gemm_of_ragged_sizes(kernels: Emulated, rng: np.random.Generator, sizes: tuple[int, int, int, int]) -> None:
    assert _gather_gemm(kernels, rng, sizes) < 1e-5


@pytest.mark.parametrize("fault", [NO_WAIT, NO_BARRIER, EARLY_COPY])
def test_missing_synchronisation_shows(kernels: Emulated, rng: np.random.Generator, fault: int) -> None:
    """A copy that nobody has waited for, a stage read before other threads filled it, a copy into what others still read."""
    assert not _gather_gemm(kernels, rng, (40, 64, 64, 256), fault) < 1e-2


@pytest.mark.parametrize(("kind", "depth"), [(0, 8), (1, 16), (2, 8)], ids=["tf32", "float16", "float16-8"])
def test_fragments(kernels: Emulated, rng: np.random.Generator, kind: int, depth: int) -> None:
    a, b = (rng.integers(-64, 65, (n, depth)).astype(np.float32) / 8 for n in (16, 8))
    y = device_array((16, 8), np.float32)
    kernels.launch("fragments", 1, 32, [on_device(a), on_device(b), y, kind])
    begun = np.where(np.arange(16)[:, None] < 8, [1, 2] * 4, [3, 4] * 4)
    np.testing.assert_array_equal(y, a @ b.T + begun)


def test_matrices_transposed(kernels: Emulated) -> None:
    x = on_device(np.arange(256, dtype=np.uint16).reshape(16, 16))
    y = device_array((16, 16), np.uint16)
    kernels.launch("transpose", 1, 32, [x, y])
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize("block", [(64,), (32, 8)], ids=str)
def test_reductions_of_warps_and_blocks(kernels: Emulated, rng: np.random.Generator, block: tuple[int, ...]) -> None:
    x = on_device(rng.integers(-50, 50, (3, 1000)).astype(np.float32))
    sums, said = device_array(3, np.float32), device_array((3, 4), np.int32)
    kernels.launch("reduce", 3, block, [x, sums, said, 1000], order="shuffled", seed=3)
    np.testing.assert_array_equal(sums, x.sum(1))
    threads = int(np.prod(block))
    shifted = sum(lane - 1 if lane % 8 else lane for lane in range(32))
    expected = [[(row[:32] > 0).sum(), (row[:threads] > 0).sum(), shifted, 11] for row in x]
    np.testing.assert_array_equal(said, expected)


@pytest.mark.parametrize("how", [{}, {"threads": 2}, {"order": "shuffled"}], ids=str)
def test_atomics(kernels: Emulated, rng: np.random.Generator, how: dict[str, Any]) -> None:
    values, bins = on_device(rng.integers(0, 40, 1000).astype(np.int32)), 40
    counts, total, last = on_device(np.zeros(bins, np.int32)), on_device(np.zeros(1, np.float32)), on_device(np.zeros(2, np.int32))
    kernels.launch("histogram", 8, 128, [values, counts, total, last, 1000, bins], 4 * bins, **how)
    np.testing.assert_array_equal(counts, np.bincount(values, minlength=bins))
    assert total[0] == 500
    assert last[0] == values.max()
    assert 1 <= last[1] <= 8


def test_shuffled_orders_find_a_missing_barrier(kernels: Emulated) -> None:
    """Ascending warps happen to hand values on in the right order; other orders do not."""
    expected = np.roll(np.arange(256), 32)

    def right(barrier: int, **how: Any) -> bool:
        y = device_array(256, np.int32)
        kernels.launch("hand_on", 1, 256, [y, barrier], **how)
        return bool(np.array_equal(y, expected))

    assert all(right(1, order="shuffled", seed=seed) for seed in range(5))
    assert not all(right(0, order="shuffled", seed=seed) for seed in range(5))
    assert not right(0, order="descending")


REFUSED = {
    0: (
        32,
        r"kernel refuse, block \(0, 0, 0\), thread \(0, 0, 0\): writes to address .*: "
        r"0 bytes after the end of argument 0, float32\[8\]",
    ),
    1: (1, "not a multiple of the vector's size"),
    2: (64, r"threads of one block wait at different barriers: some in line \d+, this one in line \d+"),
    3: (96, "deadlock: 64 of 96 threads have ended and the others wait for ever: 32 at bar.sync 1"),
    4: (32, "lanes of one warp have diverged: some are at a warp shuffle with mask 0xffffffff, this one is at a warp shuffle"),
    5: (1, r"st.shared: 4 bytes at address 0x\w+ are not inside the block's \d+ bytes of shared memory"),
    6: (1, "an access beyond the end of the block's shared memory"),
    8: (1, "trap"),
    9: (32, r"thread \(5, 0, 0\): an integer is divided by zero"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_device_refuses(kernels: Emulated, what: int) -> None:
    threads, message = REFUSED[what]
    y = device_array(8, np.float32)
    with pytest.raises(EmulationError, match=message):
        kernels.launch("refuse", 1, threads, [y, what, 8])
    kernels.launch("refuse", 1, 8, [y, -1, 8])  # the next launch is none the worse


def test_shared_memory_begins_as_nan(kernels: Emulated) -> None:
    y = on_device(np.zeros(8, np.float32))
    kernels.launch("refuse", 1, 1, [y, 7, 8])
    assert np.isnan(y[0])


def test_a_misaligned_copy_is_refused(kernels: Emulated, rng: np.random.Generator) -> None:
    with pytest.raises(EmulationError, match=r"cp.async: address 0x\w+ of shared memory is not a multiple of 16"):
        _gather_gemm(kernels, rng, (4, 32, 64, 64), MISALIGNED)


def test_launches_that_a_device_refuses(kernels: Emulated) -> None:
    y = device_array(8, np.float32)
    for name, block, args, shared, message in (
        ("nothing", 1, [], 0, "there is no kernel nothing, there are fragments"),
        ("refuse", 1, [y], 0, "has 3 parameters, 1 arguments"),
        ("refuse", 1, [1.5, 0, 0], 0, "argument 0 is a pointer, float was given"),
        ("refuse", (1024, 2), [y, -1, 0], 0, "number of threads of a block is 2048, the limit is 1024"),
        ("refuse", 1, [y, -1, 0], 228 << 10, "shared memory in bytes is 233488, the limit is 232448"),
        ("transpose", 64, [y, y], 0, "is 64, the limit is 32 .__launch_bounds__."),
    ):
        with pytest.raises(EmulationError, match=message):
            kernels.launch(name, 1, block, args, shared)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('asm volatile("tcgen05.alloc.b32 [%0], 32;" :: "r"(0));', "PTX instruction tcgen05.alloc.b32 is not emulated"),
        ('asm("mov.u32 %0, %%unheard;" : "=r"(x));', "operand '%%unheard' is not known"),
        ('asm("mov.u32 %0, 1" : "=r"(x));', "does not end with a semicolon"),
        ('asm("mov.u32 %0, 1;" : "=q"(x), "q"(x));', "begins with|operand"),
        ("__shared__ int a = 3;", "shared memory cannot be initialised"),
        ('asm("{ .reg .f16 h; }");', "registers of type .f16 are not emulated"),
    ],
)
def test_what_is_not_emulated_is_named(body: str, message: str) -> None:
    source = f'extern "C" __global__ void k(int x) {{ {body} }}'
    with pytest.raises(EmulationError, match=message):
        translate(source, cxx(), "sm_90")


def test_the_preprocessor_decides() -> None:
    source = """
#include <cuda_bf16.h>
#define PASTE(op) asm volatile(op "_group;")
#if __CUDA_ARCH__ >= 900
#error too new
#endif
// asm("nonsense;"); "asm(\\"nonsense;\\");"
extern "C" __global__ void __launch_bounds__(2 * 64) k(int* __restrict__ a);
extern "C" __global__ void __launch_bounds__(2 * 64) k(int* __restrict__ a) {
  const char* text = "asm volatile(\\"nonsense;\\");";
  PASTE("cp.async.commit");
}
"""
    made = translate(source, cxx(), "sm_80")
    assert made.kernels == ("k",)
    assert "CpAsyncCommitGroup()" in made.text
    with pytest.raises(EmulationError, match="too new"):
        translate(source, cxx(), "sm_90a")
    with pytest.raises(EmulationError, match="arch is 'hopper'"):
        translate(source, cxx(), "hopper")
    with pytest.raises(EmulationError, match=r"cooperative_groups\.h"):
        translate("#include <cooperative_groups.h>\n", cxx(), "sm_90")


@pytest.fixture(scope="session")
def hopper(folder: pathlib.Path) -> Emulated:
    return Emulated(HOPPER, folder, arch="sm_90a")


LAYOUTS = {"swizzle_128": 64, "swizzle_64": 32, "swizzle_32": 16, "plain": 8, "transposed": 64, "registers": 64}


def _wgmma(hopper: Emulated, rng: np.random.Generator, kernel: str, fault: int = 0, k: int = 280, **how: Any) -> float:
    """The largest error of y[m, n] = bias[n] + a[m] . b[n], relative to the result's rms; sizes are no multiples of a tile."""
    m, n, inner = 100, 136, LAYOUTS[kernel]
    a = on_device(rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16))
    b = on_device(rng.standard_normal((k, n) if kernel == "transposed" else (n, k)).astype(ml_dtypes.bfloat16))
    bias = on_device(rng.standard_normal(192).astype(np.float32))
    y = device_array((m, n), np.float32)
    maps = [hopper.tensor_map(x, (64, inner), 0 if inner == 8 else 2 * inner) for x in (a, b)]
    hopper.launch(kernel, (3, 2), 128, [*maps, a, bias, y, m, n, k, fault], 4 * 64 * 64 * 2, **how)
    right = b.astype(np.float64) if kernel == "transposed" else b.astype(np.float64).T
    exact = a.astype(np.float64) @ right + bias[:n]
    return float(np.abs(y - exact).max() / np.sqrt(np.mean(exact**2)))


@pytest.mark.parametrize("kernel", LAYOUTS)
def test_wgmma_and_tensor_copies(hopper: Emulated, rng: np.random.Generator, kernel: str) -> None:
    assert _wgmma(hopper, rng, kernel) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_wgmma_in_other_orders(hopper: Emulated, rng: np.random.Generator, order: Any) -> None:
    assert _wgmma(hopper, rng, "swizzle_128", order=order, seed=11, threads=2) < 1e-5


def test_sums_of_wgmma_are_nan_before_the_wait(hopper: Emulated, rng: np.random.Generator) -> None:
    assert np.isnan(_wgmma(hopper, rng, "swizzle_128", WITHOUT_WAIT, k=128))


@pytest.mark.parametrize(
    ("fault", "k", "message"),
    [
        (COPIED_EARLY, 280, "wgmma: operand . in shared memory has been changed before wgmma.wait_group"),
        (FEW_BYTES, 280, r"wait for ever: 128 at an mbarrier at address \d+"),
        (WITHOUT_BARRIER, 128, "the block has ended and a cp.async.bulk.tensor has not arrived"),
        (WITHOUT_BARRIER, 280, "1 arrive at the mbarrier at 0x808, which waits for 0 more in this phase"),
        (WITHOUT_FENCE, 280, "wgmma.mma_async without a wgmma.fence before it"),
    ],
)
def test_wgmma_faults_are_named(hopper: Emulated, rng: np.random.Generator, fault: int, k: int, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        _wgmma(hopper, rng, "swizzle_128", fault, k)


def test_copies_that_an_mbarrier_counts(hopper: Emulated, rng: np.random.Generator) -> None:
    x = on_device(rng.integers(-9, 9, (100, 4)).astype(np.float32))
    rows = on_device(rng.integers(0, 100, 64).astype(np.int32))
    for early, order in ((0, "ascending"), (0, "shuffled"), (1, "ascending")):
        y = device_array(64, np.float32)
        hopper.launch("gathered", 1, 64, [x, rows, y, early], order=order)
        assert np.array_equal(y, np.roll(x[rows].sum(1), -1)) == (not early)


def test_tensor_maps_that_the_driver_refuses(hopper: Emulated) -> None:
    for shape, box, swizzle, message in (
        ((8, 12), (8, 8), 0, "stride 0 is 24, it has to be a multiple of 16"),
        ((8, 64), (8, 64), 64, "box row in bytes is 128, and its swizzle takes at most 64"),
        ((512, 64), (512, 8), 0, "box size 1 is 512, it has to be 1 to 256"),
        ((8, 64), (8, 4), 0, "box row in bytes is 8, which is not a multiple of 16"),
    ):
        with pytest.raises(EmulationError, match=message):
            hopper.tensor_map(device_array(shape, np.float16), box, swizzle)


DRIVER = """
import ctypes, struct
import numpy as np
cuda = ctypes.CDLL("libcuda.so.1")
u64, size = ctypes.c_uint64, ctypes.c_size_t

def check(status, expected=0):
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    assert status == expected, (status, text.value)
    return text.value.decode()

def device(bytes):
    at = u64()
    check(cuda.cuMemAlloc_v2(ctypes.byref(at), size(bytes)))
    return at

check(cuda.cuInit(0))
value, name = ctypes.c_int(), ctypes.create_string_buffer(64)
check(cuda.cuDeviceGetAttribute(ctypes.byref(value), 16, 0))
check(cuda.cuDeviceGetName(name, 64, 0))
print(value.value, name.value.decode())
library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
check(cuda.cuLibraryLoadData(ctypes.byref(library), b"image", None, None, 0, None, None, 0))
print(check(cuda.cuLibraryGetKernel(ctypes.byref(kernel), library, b"missing"), 500))
check(cuda.cuLibraryGetKernel(ctypes.byref(kernel), library, b"histogram"))

x = np.random.default_rng(0).integers(0, 10, 1000).astype(np.int32)
values, counts, rest = device(x.nbytes), device(40), device(16)
check(cuda.cuMemcpyHtoD_v2(values, ctypes.c_void_p(x.ctypes.data), size(x.nbytes)))
check(cuda.cuMemsetD32_v2(counts, 0, size(10)))
check(cuda.cuMemsetD8_v2(rest, 0, size(16)))

def launch(counts, expected=0, bins=10, shared=40):
    parameters = [values, counts, rest, u64(rest.value + 8), ctypes.c_int(1000), ctypes.c_int(bins)]
    addresses = (ctypes.c_void_p * 6)(*(ctypes.addressof(p) for p in parameters))
    return check(cuda.cuLaunchKernel(kernel, 8, 1, 1, 128, 1, 1, shared, None, addresses, None), expected)

launch(counts)
found = np.empty(10, np.int32)
check(cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(found.ctypes.data), counts, size(40)))
assert (found == np.bincount(x, minlength=10)).all(), found
print(launch(u64(counts.value + 4), 719))
print(launch(u64(counts.value + 220), 719))
print(launch(counts, 1, shared=60000))
check(cuda.cuKernelSetAttribute(8, 60000, kernel, 0))
launch(counts, shared=60000)
print(check(cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(found.ctypes.data), u64(counts.value + 4), size(40)), 1))
check(cuda.cuMemFree_v2(values))
print(check(cuda.cuMemFree_v2(values), 1))
"""


def test_driver(folder: pathlib.Path) -> None:
    """A process of its own with the emulated driver: copies, launches, and errors as the driver reports them."""
    emulated = environment(SOURCE, folder)
    done = subprocess.run([sys.executable, "-c", DRIVER], env=emulated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "132 emulated sm_90"
    assert lines[1] == "there is no kernel missing"
    assert lines[2] == "kernel histogram writes after the end of an allocation of 40 bytes"
    assert lines[3].startswith("kernel histogram, block (")
    assert "which is in no allocation" in lines[3]
    assert lines[4].endswith("60000 bytes of dynamic shared memory, and its attribute allows 49152")
    assert lines[5] == "a copy reads 40 bytes that are no memory of the device"
    assert lines[6] == "memory is freed that was not given, or twice"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernels_are_cuda(tmp_path: pathlib.Path) -> None:
    """What the emulator takes here is what nvcc takes."""
    for name, arch in (("emulated", "sm_90"), ("emulated_hopper", "sm_90a")):
        command = ["nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-o", str(tmp_path / name), str(ROOT / f"tests/cuda/{name}.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
