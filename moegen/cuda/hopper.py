"""Kernels for Hopper from TVM script: an emitted module in, CUDA C++ and what a launch needs to know out."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
from typing import Any

from ..compiler import load_module
from ..config import MoEConfig
from ..errors import without_compiler
from ..schedules.cuda import hopper
from .emission import hopper_source

try:
    import tvm
    from tvm.tirx.build import split_host_device_mods
except ModuleNotFoundError as error:
    raise without_compiler(error) from None

ARCHITECTURE = "sm_90a"

# NVRTC has no cuda.h, which is the host's; a kernel needs the size and alignment only.
_PRELUDE = """#ifdef __CUDACC_RTC__
struct alignas(128) CUtensorMap { unsigned long long opaque[16]; };
#endif
"""


@dataclasses.dataclass(frozen=True)
class HopperKernel:
    """One grouped product as CUDA C++, with what a host needs to launch it.

    The grid is one-dimensional: one block for each multiprocessor, and `grid` (int32) says how many there are. More would wait
    for their turn, fewer are right as well. Launch after `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES` was set.

    Args:
        name: the kernel's, `extern "C"`.
        source: CUDA C++ for `sm_90a`, by nvcc or NVRTC. Approximate division and flushed denormals are welcome.
        arguments: names in the order of the kernel's parameters. Tensor maps are passed by value; the other names are device
            pointers, but for `grid`. An argument of the layer that the kernel does not use has no parameter.
        tensor_maps: how those are encoded.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
        te_source: the module that `source` was compiled from.
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    tensor_maps: tuple[hopper.TensorMap, ...]
    threads: int
    shared_bytes: int
    te_source: str


def hopper_kernel(config: MoEConfig, product: hopper.GroupedProduct, knobs: hopper.Knobs, name: str) -> HopperKernel:
    """The kernel `name` of one grouped product; `config` gives the activation.

    Raises:
        ScheduleError: the knobs are illegal.
        BuildError: the emitted module fails.
    """
    hopper.check(product, knobs)
    sizes = hopper.layout(product, knobs)
    te_source = hopper_source(config, _values(product, knobs, sizes) | {"name": name})
    with tempfile.TemporaryDirectory() as folder:  # TVM script is read from its file
        function = load_module(te_source, pathlib.Path(folder) / f"{name}.py").kernel
    source, parameters = _device_source(function, name)
    arguments = tuple(re.sub("(_pointer)?(_ptr)?$", "", parameter) for parameter in parameters)
    maps = hopper.tensor_maps(product, knobs)
    return HopperKernel(name, source, arguments, maps, hopper.THREADS, sizes.shared_bytes, te_source)


def _values(product: hopper.GroupedProduct, knobs: hopper.Knobs, sizes: hopper.Layout) -> dict[str, Any]:
    constants = ("CONSUMERS", "PRODUCER_REGISTERS", "CONSUMER_REGISTERS", "SLAB_BYTES", "SLAB_COLUMNS", "STEP", "THREADS")
    short = hopper.DTYPES[product.dtype]
    return {"product": product, "knobs": knobs, "sizes": sizes, "short": short} | {
        name: getattr(hopper, name) for name in constants
    }


def _device_source(function: Any, name: str) -> tuple[str, list[str]]:
    """CUDA C++ of a function in TVM script, and the names of its parameters in the order that TVM gave them."""
    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": ARCHITECTURE,
            "max_shared_memory_per_block": hopper.MAX_SHARED_BYTES,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
        },
        host="llvm",
    )
    lower, _, finish = tvm.tirx.get_tir_pipeline("tirx")
    # Loops are unrolled by nvcc: the source stays readable.
    with target, tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False}}):
        _, on_device = split_host_device_mods(lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule({name: function}))))
        ((target, module),) = on_device.items()
        ((_, kernel),) = module.functions.items()
        # With a block's registers known to be all of a multiprocessor's, ptxas lets warpgroups pass them to one another.
        kernel = kernel.with_attr({"global_symbol": name, "tirx.launch_bounds_min_blocks_per_sm": 1})
        module = finish()(tvm.IRModule({name: kernel}))
        source = str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source())
    return _PRELUDE + source, [str(parameter.name) for parameter in kernel.params]
