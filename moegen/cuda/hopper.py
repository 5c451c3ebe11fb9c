"""Kernels for Hopper from TVM script: an emitted module in, CUDA C++ and what a launch needs to know out."""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ..compiler import load_module
from ..cuda_geometry import CudaGeometry
from ..errors import without_compiler
from ..schedules.cuda import hopper
from .emission import hopper_source
from .kernels import HopperKernel, HopperProgram

try:
    import tvm
    from tvm.tirx.build import split_host_device_mods
except ModuleNotFoundError as error:
    raise without_compiler(error) from None

# NVRTC has no cuda.h, which is the host's; a kernel needs the size and alignment only.
_PRELUDE = """#ifdef __CUDACC_RTC__
struct alignas(128) CUtensorMap { unsigned long long opaque[16]; };
#endif
"""


def lower(geometry: CudaGeometry, knobs: Mapping[str, hopper.Knobs]) -> HopperProgram:
    """The kernels of a layer that Hopper has of its own, in one source.

    Args:
        knobs: by the stages whose place the kernels take, `up_128` or `down_128`; none, one or several.

    Raises:
        ScheduleError: the knobs are illegal.
        BuildError: an emitted module fails.
    """
    if not knobs:
        return HopperProgram("", ())
    made, functions = [], {}
    for stage, chosen in knobs.items():
        product = hopper.GroupedProduct.of(geometry, stage.partition("_")[0])
        hopper.check(product, chosen)
        symbol, sizes = f"{stage}{hopper.SUFFIX}", hopper.layout(product, chosen)
        script = hopper_source(geometry.config, _values(product, chosen, sizes) | {"name": symbol})
        with tempfile.TemporaryDirectory() as folder:  # TVM script is read from its file
            function = load_module(script, pathlib.Path(folder) / f"{symbol}.py").kernel
        functions[symbol] = _device_function(function, symbol)
        arguments = tuple(re.sub("(_pointer)?(_ptr)?$", "", str(p.name)) for p in functions[symbol].params)
        maps = hopper.tensor_maps(product, chosen)
        made.append(HopperKernel(stage, symbol, arguments, maps, hopper.THREADS, sizes.shared_bytes, script))
    return HopperProgram(_source(functions), tuple(made))


def _values(product: hopper.GroupedProduct, knobs: hopper.Knobs, sizes: hopper.Layout) -> dict[str, Any]:
    constants = ("CONSUMERS", "PRODUCER_REGISTERS", "CONSUMER_REGISTERS", "SLAB_BYTES", "SLAB_COLUMNS", "STEP", "THREADS")
    short = hopper.DTYPES[product.dtype]
    return {"product": product, "knobs": knobs, "sizes": sizes, "short": short} | {
        name: getattr(hopper, name) for name in constants
    }


def _device_function(function: Any, symbol: str) -> Any:
    """What a function in TVM script launches, lowered; its parameters are in the order that TVM gave them."""
    lowered, _, _ = tvm.tirx.get_tir_pipeline("tirx")
    with _context():
        bound = tvm.tirx.transform.BindTarget(_target())(tvm.IRModule({symbol: function}))
        _, on_device = split_host_device_mods(lowered(bound))
    (module,) = on_device.values()
    (kernel,) = module.functions.values()
    # With a block's registers known to be all of a multiprocessor's, ptxas lets warpgroups pass them to one another.
    return kernel.with_attr({"global_symbol": symbol, "tirx.launch_bounds_min_blocks_per_sm": 1})


def _source(functions: Mapping[str, Any]) -> str:
    """CUDA C++ of functions that `_device_function` made."""
    _, _, finish = tvm.tirx.get_tir_pipeline("tirx")
    with _context():
        module = finish()(tvm.IRModule(dict(functions)))
        return _PRELUDE + str(tvm.get_global_func("target.build.cuda")(module, _target()).inspect_source())


def _target() -> Any:
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": hopper.ARCHITECTURE,
            "max_shared_memory_per_block": hopper.MAX_SHARED_BYTES,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
        },
        host="llvm",
    )


@contextlib.contextmanager
def _context() -> Iterator[None]:
    # Loops are unrolled by nvcc: the source stays readable.
    with _target(), tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False}}):
        yield
