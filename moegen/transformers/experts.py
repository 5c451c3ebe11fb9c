"""From an experts module of transformers to the layer that it is, and to its weights as moegen takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import torch

from ..arrays import HostArray, as_host_array
from ..config import DTYPES, MoEConfig
from ..errors import ConfigError, WeightsError
from ..orientation import Matrix
from ..weights import WeightSource
from .gating import gating_of

_CHECKED = (
    "experts", "top_k", "hidden", "intermediate", "activation", "expert_bias", "weight_on_input", "swiglu_alpha", "swiglu_limit",
)  # fmt: skip
_OTHERWISE = "use another experts implementation for this model, e.g. 'grouped_mm'"


@dataclasses.dataclass(frozen=True)
class Experts:
    """The routed experts of one module.

    Args:
        config: the layer; router and shared expert are the model's where moegen knows its type, and of no account otherwise.
        gate_up: "stacked" or "interleaved".
        transposed: matrices are input-first, [E, H, 2I] and [E, I, H].
    """

    config: MoEConfig
    gate_up: str
    transposed: bool


def parameter_names(module: Any) -> list[str]:
    """The parameters of an experts module that hold its weights."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return [*names, *(f"{name}_bias" for name in names)] if module.has_bias else names


def parameters_of(module: Any) -> list[torch.Tensor]:
    """The weights of an experts module, in the order of `parameter_names`.

    Raises:
        WeightsError: they are distributed, released, or not what moegen packs.
    """
    found = []
    for name in parameter_names(module):
        value = getattr(module, name, None)
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{type(module).__name__} has no parameter {name!r}: {_OTHERWISE}")
        if hasattr(value, "full_tensor") and hasattr(value, "placements"):
            raise WeightsError(f"{name} is a DTensor (tensor parallelism), of which moegen packs none: {_OTHERWISE}")
        found.append(value)
    return found


def understand(module: Any, top_k: int) -> Experts:
    """What layer the module's experts are.

    Args:
        top_k: K, experts that each token visits.

    Raises:
        ConfigError: the module computes something that moegen has no kernel for; the message names what.
        WeightsError: its weights are not what moegen packs.
    """
    _check_kind(module)
    first, down = parameters_of(module)[:2]
    _check_parameters(module)
    experts, rows, columns = first.shape
    if module.is_transposed:
        rows, columns = columns, rows
    intermediate = rows // 2 if module.has_gate else rows
    expected = (experts, intermediate, columns) if module.is_transposed else (experts, columns, intermediate)
    if tuple(down.shape) != expected:
        raise WeightsError(f"down_proj of {type(module).__name__} has shape {list(down.shape)}, expected {list(expected)}")
    gating = gating_of(module, intermediate)
    alone = MoEConfig(
        experts=experts,
        top_k=top_k,
        hidden=columns,
        intermediate=intermediate,
        dtype=_dtype(first),
        expert_bias=module.has_bias,
        **gating.fields,
    )
    return Experts(_of_model(module, alone), gating.gate_up, module.is_transposed)


def _check_kind(module: Any) -> None:
    name = type(module).__name__
    if module.has_post_expert_norm:
        raise ConfigError(f"has_post_expert_norm: {name} normalises each expert's output, which moegen does not: {_OTHERWISE}")
    if module._is_expert_parallel:
        raise ConfigError(
            f"_is_expert_parallel: {name} holds a part of its experts only (expert parallelism of transformers), which moegen does "
            f"not run: {_OTHERWISE}"
        )


def _check_parameters(module: Any) -> None:
    named = dict(zip(parameter_names(module), parameters_of(module), strict=True))
    first = next(iter(named.values()))
    for name, value in named.items():
        where = f"{name} of {type(module).__name__}"
        if value.device.type not in ("cpu", "cuda"):
            raise WeightsError(f"{where} is on device {str(value.device)!r}: moegen runs experts on the CPU and on CUDA devices")
        if _dtype(value) not in DTYPES:
            raise WeightsError(f"{where} has dtype {_dtype(value)}, moegen runs {', '.join(DTYPES)}: {_OTHERWISE}")
        if (value.dtype, value.device) != (first.dtype, first.device):
            raise WeightsError(
                f"{where} is {_dtype(value)} on {value.device}, the first projection is {_dtype(first)} on {first.device}: all "
                "weights of a layer's experts have to be of one type in one place"
            )


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _of_model(module: Any, alone: MoEConfig) -> MoEConfig:
    """The layer as `moegen build --model config.json` makes it of the model's configuration, where that has these experts."""
    try:
        whole = MoEConfig.from_hf(module.config.to_dict()).whole
        whole = dataclasses.replace(whole, dtype=alone.dtype)
    except (ConfigError, AttributeError):  # a type or a router that moegen does not know: the experts are all that is needed
        return alone
    same = all(getattr(whole, name) == getattr(alone, name) for name in _CHECKED)
    return whole if same else alone


def weights_of(module: Any, experts: Experts) -> WeightSource:
    """The routed experts' weights; those on a CUDA device are copied one expert at a time.

    Raises:
        WeightsError: they are not there any more, or not in the memory of this machine.
    """
    named = dict(zip(parameter_names(module), parameters_of(module), strict=True))
    arrays: dict[str, Sequence[Matrix]] = {}
    for name, value in named.items():
        kind = "bias" if name.endswith("_bias") else "weight"
        swap = experts.transposed and kind == "weight"
        part = name.removesuffix("_bias").removesuffix("_proj")
        for piece, rows in _pieces(part, experts):
            arrays[f"experts.{piece}.{kind}"] = _OfExperts(value, swap, rows)
    return WeightSource(experts.config, arrays)


def _pieces(part: str, experts: Experts) -> list[tuple[str, slice]]:
    """Canonical names of what one parameter holds, and the rows that each has of it."""
    if part != "gate_up":
        return [(part, slice(None))]
    if experts.gate_up == "interleaved":
        return [("gate", slice(0, None, 2)), ("up", slice(1, None, 2))]
    width = experts.config.intermediate
    return [("gate", slice(0, width)), ("up", slice(width, None))]


class _OfExperts(Sequence[Matrix]):
    """One matrix (or bias) of each expert, output-first, as a view of the parameter; read when it is asked for."""

    def __init__(self, value: torch.Tensor, swap: bool, rows: slice) -> None:
        self.value, self.swap, self.rows = value, swap, rows

    def __len__(self) -> int:
        return int(self.value.shape[0])

    @overload
    def __getitem__(self, e: int) -> Matrix: ...
    @overload
    def __getitem__(self, e: slice) -> Sequence[Matrix]: ...
    def __getitem__(self, e: int | slice) -> Matrix | Sequence[Matrix]:
        if isinstance(e, slice):
            return [self[i] for i in range(*e.indices(len(self)))]
        host = as_host_array(self.value[e].detach().cpu(), "the experts' weights", WeightsError)
        data = host.data.swapaxes(-1, -2) if self.swap else host.data
        return HostArray(data[self.rows], host.dtype)
