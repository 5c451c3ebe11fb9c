"""Rendering: a geometry in, the text of the tensor-expression module and of the C++ host out."""

from __future__ import annotations

import dataclasses
import functools
import pprint
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .config import MoEConfig
from .errors import without_compiler
from .geometry import ITEM_BYTES, Geometry, Product, Regime, Segment
from .paths import package_folder
from .target import Target
from .version import __version__

try:
    import jinja2
except ModuleNotFoundError as error:
    raise without_compiler(error) from None

GATED_CALLS = {
    "swiglu": ("silu", "silu({gate}) * ({up})"),
    "reglu": ("relu", "relu({gate}) * ({up})"),
    "geglu": ("gelu", "gelu({gate}) * ({up})"),
    "geglu_tanh": ("gelu_tanh", "gelu_tanh({gate}) * ({up})"),
    "swiglu_clamped": ("swiglu_clamped", "swiglu_clamped({gate}, {up})"),
}
NEEDS = {
    "silu": ("sigmoid",),
    "gelu_tanh": ("sigmoid",),
    "swiglu_clamped": ("sigmoid",),
    "gelu": ("normal_cdf",),
    "relu2": ("relu",),
    "sigmoid": ("exp",),
    "normal_cdf": ("exp",),
}
_DLPACK = {
    "float32": "kF32", "bfloat16": "kBF16", "float16": "kF16", "int8": "kI8", "uint8": "kU8", "uint16": "kU16", "uint32": "kU32",
}  # fmt: skip
PARTS = ("router", "topk", "dispatch", "gather", "up", "down", "finish")  # of a call, as `moe_profile` tells them apart
ORDER = ("exp", "sigmoid", "normal_cdf", "silu", "relu", "relu2", "gelu", "gelu_tanh", "swiglu_clamped")


def te_source(geometry: Geometry, target: Target) -> str:
    """The readable, specialised Python module of TVM tensor-expression definitions."""
    config = geometry.config
    ffns: list[tuple[str, Product, Product]] = [("expert", geometry.up, geometry.down)]
    if config.shared_intermediate:
        ffns.append(("shared", geometry.shared_up, geometry.shared_down))
    text = (
        environment()
        .get_template("te/module.py.jinja")
        .render(
            title=title(config),
            version=__version__,
            target=str(target),
            config=config,
            tiling=geometry.tiling,
            config_literal=pprint.pformat(config.to_dict(), sort_dicts=False, width=120),
            tiling_literal=repr(dataclasses.asdict(geometry.tiling)),
            functions=functions(config),
            gated_call=GATED_CALLS.get(config.activation, ("", ""))[1],
            ffns=ffns,
            router=geometry.router,
            up=geometry.up,
            out=geometry.down,
            many_threads=False,
        )
    )
    return re.sub(r"\n{2,}(?=def )", "\n\n\n", text)  # two blank lines between functions, whatever was left out


def host_source(geometry: Geometry, stages: Sequence[str], regimes: Sequence[Regime]) -> str:
    """The C++ host that runs the compiled stages in order and exports the layer's entry points."""
    return (
        environment()
        .get_template("llvm/host.cc.jinja")
        .render(
            title=title(geometry.config),
            version=__version__,
            config=geometry.config,
            tiling=geometry.tiling,
            geometry=geometry,
            segments={s.name: s for s in geometry.segments},
            stages=stages,
            regimes=regimes,
            parts=PARTS,
            up=geometry.up,
            packed=_packed(geometry),
            dtype=_DLPACK[geometry.config.dtype],
            dlpack=_DLPACK,
            item_bytes=ITEM_BYTES,
        )
    )


def _packed(geometry: Geometry) -> list[dict[str, Any]]:
    """How each segment is packed from matrices [n, k], in the order of the segments."""
    products = {"router": geometry.router}
    for prefix, up, down in geometry.ffns:
        products |= {f"{prefix}up": up, f"{prefix}down": down}
    return [_packing(segment, products) for segment in geometry.segments]


def _packing(segment: Segment, products: Mapping[str, Product]) -> dict[str, Any]:
    known: dict[str, Any] = {"name": segment.name, "offset_bytes": segment.offset_bytes, "bits": 8 * ITEM_BYTES[segment.dtype]}
    known |= {"pair": 1, "nibbles": False, "flipped": 0}
    if segment.name == "correction_bias":  # copied as it is
        return known | {"count": 1, "n": segment.shape[0], "panels": 0, "k": 0, "k_padded": 0, "lanes": 0, "gated": False}
    name = segment.name if segment.name in products else segment.name.rpartition("_")[0]
    p = products[name]
    known |= {"count": p.count, "n": p.n, "panels": p.panels, "lanes": p.lanes, "gated": p.gated}
    if segment.name != name:  # a bias, or something for each group of a column
        terms = 1 if segment.name.endswith("bias") else segment.shape[2]
        return known | {"k": terms, "k_padded": terms}
    nibbles = p.bits == 4
    flipped = 8 if p.weight_dtype == "int4" else 0  # -8 becomes 0
    bits = 8 if nibbles else known["bits"]
    return known | {"k": p.k, "k_padded": p.k_padded, "pair": p.pair, "nibbles": nibbles, "flipped": flipped, "bits": bits}


def title(config: MoEConfig) -> str:
    """The layer in a line."""
    return (
        f"E={config.experts} K={config.top_k} H={config.hidden} I={config.intermediate} "
        f"{config.dtype} {config.gating} {config.activation}"
    )


def functions(config: MoEConfig, *, gates: bool = False) -> list[str]:
    """Names of the element-wise functions that the module uses, in the order in which they build on one another.

    Args:
        gates: the module itself weighs the shared expert with its gate.
    """
    sigmoid = config.gating == "sigmoid" or (gates and config.shared_gate)
    return _with_needs({_activation(config), "exp"} | ({"sigmoid"} if sigmoid else set()))


def activation_functions(config: MoEConfig) -> list[str]:
    """The same of the activation alone, on hardware that has `exp` and from it `sigmoid`."""
    return [name for name in _with_needs({_activation(config)}) if name not in ("exp", "sigmoid")]


def _activation(config: MoEConfig) -> str:
    return GATED_CALLS[config.activation][0] if config.gated else config.activation


def _with_needs(wanted: set[str]) -> list[str]:
    while missing := {n for name in wanted for n in NEEDS.get(name, ())} - wanted:
        wanted |= missing
    return [name for name in ORDER if name in wanted]


@functools.cache
def environment() -> jinja2.Environment:
    """What templates are rendered with; one, because it keeps what it has compiled of them, and notices when they change."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(package_folder("templates")),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
