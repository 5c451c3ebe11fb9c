"""Rendering for CUDA: a geometry in, the text of the tensor-expression module, of hand-written kernels and of the C++ host out."""

from __future__ import annotations

import dataclasses
import pprint
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import emission
from ..config import MoEConfig
from ..cuda_geometry import CudaGeometry
from ..geometry import ITEM_BYTES, Segment
from ..target import Target
from ..version import __version__
from .kernels import HopperKernel, Program

DISPATCH = "dispatch_kernel"
ROUTER_ROWS = 64
ROUTER_FEW_TOKENS = 16
INT32_MAX = 2**31 - 1

# (side, argument of a kernel of Hopper's own) -> the same among what stages take.
_HOPPER_VALUES = {
    (side, argument): value
    for side, output in (("up", "output"), ("down", "y"))
    for argument, value in {
        "x": "x", "rows": "x", "weights": "w", "bias": "bias", "output": output,
        "row_token": "token", "row_slot": "slot", "row_weight": "weight", "block_expert": "expert", "blocks": "used",
    }.items()
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Image:
    """Machine code or PTX inside the library.

    Args:
        name: as it was embedded.
        capability: compute capability that machine code is for; None for PTX.
        oldest: the oldest that PTX is for; None for machine code.
        specific: runs on that one alone.
        tegra: as in `Architecture`.
        hopper: has the kernels that Hopper has of its own, and no others.
    """

    name: str
    capability: tuple[int, int] | None = None
    oldest: tuple[int, int] | None = None
    specific: bool = False
    tegra: bool = False
    hopper: bool = False


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """One line of the table that says how many rows a row block has.

    Args:
        rows_up_to: most rows of an expert in the mean that this holds for; None in the last line.
        rows: of a row block.
    """

    rows_up_to: int | None
    rows: int


def te_source(geometry: CudaGeometry, target: Target, rows: Sequence[int]) -> str:
    """The readable, specialised Python module of TVM tensor-expression definitions.

    Args:
        rows: of the row blocks that there are tile kernels for.
    """
    config = geometry.config
    text = (
        emission.environment()
        .get_template("cuda/module.py.jinja")
        .render(
            title=emission.title(config),
            version=__version__,
            target=str(target),
            config=config,
            tiling={"rows": list(rows)},
            config_literal=pprint.pformat(config.to_dict(), sort_dicts=False, width=120),
            tiling_literal=repr({"rows": list(rows)}),
            functions=emission.functions(config, gates=True),
            gated_call=emission.GATED_CALLS.get(config.activation, ("", ""))[1],
            ffns=geometry.ffns,
            prefixes=[prefix for prefix, _, _ in geometry.ffns],
            router=geometry.router,
            router_rows=ROUTER_ROWS,
            router_terms=geometry.router_terms,
            token_copy=geometry.token_copy,
            item_bytes=geometry.item_bytes,
            terms_type=geometry.terms_type,
            many_threads=True,
        )
    )
    return re.sub(r"\n{2,}(?=def )", "\n\n\n", text)


def host_source(
    geometry: CudaGeometry,
    target: Target,
    program: Program,
    images: Sequence[Image],
    regimes: Sequence[RowBlocks],
    few_tokens: int,
    route_tokens: int,
    hopper: Sequence[HopperKernel] = (),
) -> str:
    """The C++ host that launches the compiled stages in order and exports the layer's entry points.

    Args:
        program: the stages.
        images: as they are embedded, those before others that a device which runs both should take first.
        regimes, few_tokens, route_tokens: of `CudaPlan`.
        hopper: kernels that take a stage's place on Hopper.
    """
    config, stages = geometry.config, program.stages
    kernels = [kernel for stage in stages.values() for kernel in stage.kernels]
    pointers = {p.name.replace(".", "_") for kernel in kernels for p in kernel.parameters if p.pointer}
    pointers |= {_HOPPER_VALUES[kernel.side, name] for kernel in hopper for name in kernel.arguments if name != "grid"}
    rows = sorted({int(name.rpartition("_")[2]) for name in stages if name.startswith("up_") and name != "up_few"})
    return (
        emission.environment()
        .get_template("cuda/host.cc.jinja")
        .render(
            title=emission.title(config),
            version=__version__,
            target=str(target),
            config=config,
            geometry=geometry,
            ffns=geometry.ffns,
            router=geometry.router,
            terms_type=geometry.terms_type,
            item_bytes=geometry.item_bytes,
            dlpack={"float32": "kDLFloat", "float16": "kDLFloat", "bfloat16": "kDLBfloat"}[config.dtype],
            stages=stages,
            symbols=[*(kernel.symbol for kernel in kernels), DISPATCH, *(kernel.symbol for kernel in hopper)],
            shared_bytes=[*(kernel.shared_bytes for kernel in kernels), 0, *(kernel.shared_bytes for kernel in hopper)],
            hopper={kernel.stage: kernel for kernel in hopper},
            hopper_values=_HOPPER_VALUES,
            pointers=sorted(pointers),
            tiled=[f"{prefix}{product}" for prefix, _, _ in geometry.ffns for product in ("up", "down")],
            tiles=rows,
            regimes=regimes,
            few_tokens=few_tokens,
            route_tokens=route_tokens,
            router_few_tokens=ROUTER_FEW_TOKENS,
            router_rows=ROUTER_ROWS,
            max_tokens=INT32_MAX // config.top_k,
            offsets={segment.name: segment.offset_bytes for segment in geometry.segments},
            segments=[_segment(geometry, segment) for segment in geometry.segments],
            images=[image for image in images if not image.hopper],
            hopper_image=next((image for image in images if image.hopper), None),
        )
    )


def unused(config: MoEConfig, route_tokens: int) -> frozenset[str]:
    """Stages that nobody launches when the router and the choice of experts are one launch up to so many tokens."""
    router = route_tokens >= ROUTER_FEW_TOKENS and not config.shared_gate  # whose logit jitter makes another one
    return frozenset((["route"] if route_tokens == 0 else []) + (["router_few"] if router else []))


def dispatch_source(config: MoEConfig) -> str:
    """The kernel that sorts choices into row blocks."""
    return emission.environment().get_template("cuda/dispatch.cu.jinja").render(config=config)


def hopper_source(config: MoEConfig, values: Mapping[str, Any]) -> str:
    """The readable Python module of one grouped product on Hopper: a function in TVM script, sizes as constants.

    Args:
        values: what `cuda/hopper.py.jinja` is rendered with beside the layer; `hopper` decides it.
    """
    text = (
        emission.environment()
        .get_template("cuda/hopper.py.jinja")
        .render(
            title=emission.title(config),
            version=__version__,
            config=config,
            functions=emission.activation_functions(config),
            call=emission.GATED_CALLS[config.activation][1].format(gate="gate", up="up")
            if config.gated
            else f"{config.activation}(up)",
            **values,
        )
    )
    return re.sub(r"\n{2,}(?=def |@)", "\n\n\n", text)


def _segment(geometry: CudaGeometry, segment: Segment) -> dict[str, Any]:
    """How a segment is filled from matrices [n, k]."""
    known = {"name": segment.name, "offset": segment.offset_bytes, "item_bytes": ITEM_BYTES[segment.dtype]}
    if segment.name == "correction_bias":
        return known | {"count": 1, "parts": 1, "n_padded": 1, "k_padded": segment.shape[0], "n": 1, "k": segment.shape[0]}
    p = geometry.products[segment.name.removesuffix("_bias")]
    known |= {"count": p.count, "parts": p.parts}
    if segment.name.endswith("_bias"):
        return known | {"n_padded": 1, "k_padded": p.n_padded, "n": 1, "k": p.n}
    return known | {"n_padded": p.n_padded, "k_padded": p.k_padded, "n": p.n, "k": p.k}
