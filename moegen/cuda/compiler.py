"""TVM for CUDA: an emitted module's stages scheduled, and lowered to CUDA C++ source; machine code is made by `nvidia`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .. import compiler as llvm_compiler
from ..cuda_geometry import COPY_BYTES, CudaGeometry, Product
from ..errors import BuildError, ScheduleError, without_compiler
from ..geometry import ITEM_BYTES
from ..paths import package_folder
from ..schedules import cuda as schedules
from . import joining
from .architectures import Architecture
from .kernels import Intermediate, Kernel, Parameter, Program, Stage

try:
    import tvm
    import tvm.s_tir
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import Call

    from . import rewriting
except ModuleNotFoundError as error:
    raise without_compiler(error) from None

_SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)\s*\{')
_COPY = re.compile(r"(void ptx_cp_async_legacy\w*\(void\* dst, int dst_off, void\* src, )int( src_off)")
_MOST_SHARED_BYTES = 227 * 1024  # for TVM's own check; what an architecture has is checked where tiles are


def lower(
    stages: Mapping[str, Any],
    geometry: CudaGeometry,
    knobs: Mapping[str, Any],
    architectures: Sequence[Architecture],
    tf32: bool = False,
    unused: Collection[str] = (),
) -> Program:
    """The stages of an emitted module as CUDA C++.

    Args:
        stages: name -> tensors, as the module's `stages` gives them.
        knobs: stage -> `tiling.Tile`, `few.Knobs` or `route.Knobs`, for those that have any.
        architectures: that the kernels have to run on.
        tf32: multiply float32 on tensor cores, rounded to 10 bits of mantissa.
        unused: stages that nobody launches.

    Raises:
        ScheduleError: knobs are illegal.
        BuildError: the module's stages cannot be lowered.
    """
    halves = {half: stages[of] for half, of in _ROUTE.items() if of in stages and "route" in knobs and "route" not in unused}
    wanted = {name: stage for name, stage in stages.items() if name not in unused} | (halves if len(halves) == len(_ROUTE) else {})
    functions = llvm_compiler.prim_funcs(wanted.items())
    most_shared_bytes = min(one.max_shared_bytes_per_block for one in architectures)
    sch = tvm.s_tir.Schedule(tvm.IRModule(dict(functions)))
    scheduled = {}
    for name in functions:
        sch.work_on(name)
        wishes = _apply(sch, name, geometry, knobs, most_shared_bytes, tf32)
        scheduled[name] = rewriting.rewrite(sch.mod[name], wishes)
    seen = _Seen()
    target = tvm.target.Target(_TARGET, host="llvm")
    with (
        target,
        tvm.transform.PassContext(
            config={"tirx.use_async_copy": 1},
            instruments=[seen.instrument],
            disabled_pass=["tirx.CommonSubexprElim", "tirx.StorageRewrite"],
        ),
    ):
        executable = tvm.compile(tvm.IRModule(scheduled), target=target)
    source = _wide_offsets(str(executable.mod.imports[0].inspect_source()))
    types = _types(source)
    made = {name: _stage(name, functions[name], seen, types) for name in functions}
    source, made = _joined(source, made, geometry)
    for name in (name for name in made if stage_of(name) != name):
        tile, product = _tile(name, geometry, knobs, most_shared_bytes)
        by_memory = max(one.blocks(tile.shared_bytes(product.parts, geometry.item_bytes)) for one in architectures)
        source = joining.with_blocks(source, made[name].kernels[0], min(by_memory, tile.blocks(product.parts)))
    prelude = (package_folder("templates") / "cuda" / "device.cuh").read_text(encoding="utf-8")
    return Program(_with_prelude(source, prelude), made)


# The stage `route` is one kernel of two functions that have stages of their own as well.
_ROUTE = {"route_logits": "router_few", "route_choice": "topk"}
_FEW_THREADS = 1024  # of a multiprocessor where a kernel waits for weights: 64 registers for each
_TARGET = {
    "kind": "cuda",
    "arch": "sm_90",
    "max_shared_memory_per_block": _MOST_SHARED_BYTES,
    "max_threads_per_block": 1024,
    "thread_warp_size": 32,
}


def stage_of(function: str) -> str:
    """`up_64` is the tile kernel of `up` for blocks of 64 rows."""
    stage, _, rows = function.rpartition("_")
    return stage if rows.isdigit() else function


def _apply(sch: Any, name: str, geometry: CudaGeometry, knobs: Mapping[str, Any], most_shared_bytes: int, tf32: bool) -> Any:
    stage = stage_of(name)
    item_bytes = geometry.item_bytes
    if stage != name:
        tile, product = _tile(name, geometry, knobs, most_shared_bytes)
        schedules.tiling.check(tile, product, item_bytes, most_shared_bytes)
        return schedules.product.apply(sch, name, product, tile, item_bytes, tf32 and stage != "router")  # whose near ties decide
    if name in ("router_few", "route_logits"):
        return schedules.route.apply(sch, name, knobs["route" if name == "route_logits" else name], geometry)
    if name == "route_choice":
        return schedules.topk.apply(sch, name, geometry.config.experts, knobs["route"].columns * knobs["route"].lanes)
    if name.endswith("_few"):
        row_copy = COPY_BYTES // item_bytes if name == "down_few" else geometry.token_copy
        return schedules.few.apply(sch, name, knobs.get(name) or schedules.few.Knobs(), item_bytes, row_copy)
    if name == "topk":
        return schedules.topk.apply(sch, name, geometry.config.experts)
    if name == "losses":
        return schedules.losses.apply(sch, name)
    if name in ("pad", "combine", "combine_routed"):
        return schedules.elementwise.apply(sch, name)
    raise ScheduleError(f"there is no CUDA schedule for stage {name!r}")


def _tile(
    name: str, geometry: CudaGeometry, knobs: Mapping[str, Any], most_shared_bytes: int
) -> tuple[schedules.tiling.Tile, Product]:
    """What a tile kernel is cut into, and the product that it is of."""
    product, rows = geometry.products[stage_of(name)], int(name.rpartition("_")[2])
    return knobs.get(name) or schedules.tiling.default(rows, product, geometry.item_bytes, most_shared_bytes), product


def _joined(source: str, stages: Mapping[str, Stage], geometry: CudaGeometry) -> tuple[str, dict[str, Stage]]:
    """What can be one launch as one launch, and no thread blocks for the router's columns of padding."""
    made = dict(stages)
    if "router_few" in made:
        (kernel,) = made["router_few"].kernels
        tiles = -(-geometry.router.n // kernel.block[1])
        made["router_few"] = Stage("router_few", (dataclasses.replace(kernel, grid=(kernel.grid[0], str(tiles), "1")),))
    if _ROUTE.keys() <= made.keys():
        (logits,), (choice,) = (made.pop(half).kernels for half in _ROUTE)
        tiles = -(-geometry.router.n // logits.block[1])
        source, kernel = joining.in_turn(source, "route_kernel", logits, choice, tiles, {"output": "logits"})
        made["route"] = Stage("route", (kernel,))
    if {"up_few", "shared_up_few"} <= made.keys():
        (routed,), (shared,) = made["up_few"].kernels, made.pop("shared_up_few").kernels
        source, kernel = joining.side_by_side(source, routed, shared, {"w": "shared_w", "output": "shared_output"})
        made["up_few"] = Stage("up_few", (kernel,))
    for name in made:
        if name in ("route", "router_few"):  # there are fewer thread blocks than multiprocessors, or not many more
            source = joining.with_blocks(source, made[name].kernels[0], 1)
        elif name.endswith("_few"):
            source = joining.with_blocks(source, kernel := made[name].kernels[0], max(1, _FEW_THREADS // kernel.threads))
    return source, made


class _Seen:
    """The launches, as they are when host and device part."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, list[Any], list[str]]] = []  # symbol, arguments, names of the last of them
        self.device: dict[str, Any] = {}

        @tvm.instrument.pass_instrument
        class Watch:
            def run_after_pass(_, module: Any, info: Any) -> None:
                if info.name == "tirx.SplitHostDevice":
                    for variable, function in module.functions.items():
                        if "tirx.kernel_launch_params" in (function.attrs or {}):
                            self.device[str(variable.name_hint)] = function
                        else:
                            tvm_ffi.structural_walk(function.body, (Call, self._call))

        self.instrument = Watch()

    def _call(self, call: Any) -> None:
        if str(call.op.name) == "tirx.call_ffi_kernel":
            symbol, *arguments = call.args
            self.launches.append((str(symbol.value), arguments, [str(n) for n in call.attrs["launch_params"]]))


def _stage(name: str, function: Any, seen: _Seen, types: Mapping[str, list[str]]) -> Stage:
    kernels = tuple(
        _kernel(symbol, arguments, launch, seen.device[symbol], types[symbol])
        for symbol, arguments, launch in seen.launches
        if re.fullmatch(rf"{name}_kernel(_\d+)?", symbol)
    )
    handed = {p.name for kernel in kernels for p in kernel.parameters if p.pointer}
    buffers = [b for b in function.body.block.alloc_buffers if str(b.name) in handed]
    return Stage(name, kernels, tuple(Intermediate(str(b.name), _bytes(b)) for b in buffers))


def _kernel(symbol: str, arguments: list[Any], launch: list[str], function: Any, types: list[str]) -> Kernel:
    names = [str(p.name) for p in function.params]
    extents = dict(zip(launch, arguments[len(names) :], strict=True))
    parameters = tuple(
        Parameter(name.removesuffix("_ptr"), "*" in kind, kind.partition("*")[0].strip())
        for name, kind in zip(names, types, strict=True)
    )
    gx, gy, gz = (_c(extents[f"blockIdx.{axis}"]) if f"blockIdx.{axis}" in extents else "1" for axis in "xyz")
    bx, by, bz = (int(extents[f"threadIdx.{axis}"]) if f"threadIdx.{axis}" in extents else 1 for axis in "xyz")
    return Kernel(symbol, parameters, (gx, gy, gz), (bx, by, bz), int(extents.get("tirx.use_dyn_shared_memory", 0)))


def _types(source: str) -> dict[str, list[str]]:
    """Types of the parameters of each kernel as the source has them."""
    found = {}
    for symbol, text in _SIGNATURE.findall(source):
        found[symbol] = [parameter.rpartition(" ")[0] for parameter in text.split(", ")] if text else []
    return found


def _wide_offsets(source: str) -> str:
    """TVM's copy functions take offsets of 32 bits, which weights of more than 2**31 bytes overflow."""
    made, count = _COPY.subn(r"\1int64_t\2", source)
    if count != source.count("void ptx_cp_async_legacy"):
        raise BuildError(
            "TVM's asynchronous copies have another form than the one that moegen knows: apache-tvm is not the pinned one"
        )
    return made


def _with_prelude(source: str, prelude: str) -> str:
    """The device functions, after what TVM includes and before the first kernel."""
    at = source.index('extern "C" __global__')
    return source[:at] + prelude + "\n" + source[at:]


_OPERATORS = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "/"}


def _c(expression: Any) -> str:
    """A size, which is never negative, in C++."""
    if isinstance(expression, tirx.IntImm):
        return str(int(expression.value))
    if isinstance(expression, tirx.Var):
        return str(expression.name)
    if isinstance(expression, tirx.Cast):
        return _c(expression.value)
    kind = type(expression).__name__
    if kind in _OPERATORS:
        return f"({_c(expression.a)} {_OPERATORS[kind]} {_c(expression.b)})"
    if kind in ("Min", "Max"):
        return f"std::{kind.lower()}<int64_t>({_c(expression.a)}, {_c(expression.b)})"
    raise BuildError(f"the size {expression} of a launch is of a kind that moegen does not know")


def _bytes(buffer: Any) -> str:
    item = ITEM_BYTES.get(str(buffer.dtype), 8)
    return " * ".join([str(item), *(_c(extent) for extent in buffer.shape)])
