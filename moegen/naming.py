"""From the names that people give weights to the names of `weight_shapes`; `moegen.weights` lists what is understood.

A matrix in few bits comes in several arrays under one name: GPTQ's and AWQ's `<module>.qweight`, `.qzeros`, `.scales` and
`.g_idx`; compressed-tensors' `<module>.weight_packed` (or an int8 `.weight`), `.weight_scale`, `.weight_zero_point`,
`.weight_shape` and `.weight_g_idx`; gpt-oss' `experts.gate_up_proj_blocks` and `_scales`. They are parts of one `Given`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .config import GATED_ACTIVATIONS, MoEConfig, weight_shapes
from .errors import WeightsError

# Canonical names are looked up, so that only other names pay for compiling the patterns (which `re` keeps).
_CANONICAL = frozenset(
    [f"experts.{part}.{kind}" for part in ("gate_up", "gate", "up", "down") for kind in ("weight", "bias")]
    + [f"router.{part}" for part in ("weight", "bias", "correction_bias")]
    + [f"shared.{part}.weight" for part in ("gate", "up", "down")]
    + ["shared_gate.weight"]
)
_BLOCKS = ("mlp.", "block_sparse_moe.", "feed_forward.", "mixer.")
_ROUTER = r"(?:router|gate)\.(weight|bias|correction_bias|e_score_correction_bias)"
_SHARED = r"(?:shared|shared_experts?)\.(gate|up|down)(?:_proj)?\.weight"
_SHARED_GATE = r"shared(?:_expert)?_gate\.weight"
_PARAMETER = r"experts\.(gate_up|gate|up|down)_proj(_bias)?"
_PER_EXPERT = r"experts\.(\d{1,9})\.(?:(gate_up|gate|up|down)(?:_proj)?|(w[123]))\.(weight|bias)"
_MIXTRAL = {"w1": "gate", "w2": "down", "w3": "up"}
_PARAMETER_PARTS = r"(experts\.(?:gate_up|gate|up|down)_proj)_(blocks|scales)"
_MODULE_PARTS = frozenset(
    ["qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"]
)
_QUANTIZED = r"_blocks$|_scales?(?:_inv)?$|\.qweight$|\.qzeros$|_packed$|\.absmax$|quant_state|\.input_scale$"
_LAYER_ROUTER = r"(.+\.)(?<!experts\.)(?<!shared\.)(?<!\d\.)(?:gate|router)\.weight"


@dataclasses.dataclass(frozen=True)
class Given:
    """One weight of the mapping, understood.

    Attributes:
        key: the first of its names, as in the mapping.
        name: canonical, but "gate_up" may stand for gate and up.
        expert: None for all experts in one array.
        parameter: one of transformers' bare parameters, whose layout depends on the model.
        parts: what the array is to the matrix -> its key; "" for a plain array of values.
    """

    key: str
    name: str
    expert: int | None
    parameter: bool
    parts: dict[str, str]

    @property
    def plain(self) -> bool:
        """Whether this is one array of values, rather than codes with what belongs to them."""
        return self.parts.keys() == {""}


class _Name(NamedTuple):
    name: str
    expert: int | None
    parameter: bool


def select(weights: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Key in the mapping -> the layer's own name, for the keys under `prefix`."""
    if not isinstance(prefix, str):
        raise WeightsError(f"prefix={prefix!r} must be a string")
    for key in weights:
        if not isinstance(key, str):
            raise WeightsError(f"weight name {key!r} must be a string, not {type(key).__name__}")
    if prefix and not prefix.endswith("."):
        prefix += "."  # "layers.3" must not select "layers.30"
    names = {key: _without_block(key[len(prefix) :]) for key in weights if key.startswith(prefix)}
    if not names:
        raise WeightsError(f"no weight name starts with {prefix!r}{_layers_hint(weights)}" if weights else "there are no weights")
    return names


def understand(config: MoEConfig, names: Mapping[str, str]) -> dict[tuple[str, int | None], Given]:
    """(canonical name, expert) -> where it is given, refusing names that the layer has no use for.

    Args:
        names: key in the mapping -> the layer's own name, as `select` returns them.

    Raises:
        WeightsError: a name is unknown, there twice, or belongs to what the layer does not have.
    """
    given: dict[tuple[str, int | None], Given] = {}
    unknown = []
    for key, name in names.items():
        whole, part = _split(name)
        parsed = _parse(whole)
        if parsed is None:
            unknown.append(key)
            continue
        entry = given.setdefault((parsed.name, parsed.expert), Given(key, *parsed, {}))
        _check_wanted(config, entry)
        if part in entry.parts or parsed.parameter != entry.parameter:
            raise WeightsError(f"{entry.parts.get(part, entry.key)!r} and {key!r} are both {entry.name!r}")
        entry.parts[part] = key
    if unknown:
        raise WeightsError(_unknown(unknown, names))
    return given


def spellings(name: str) -> list[str]:
    """The names under which a canonical weight is looked for, as plain arrays."""
    part, _, rest = name.partition(".")
    if part == "router":
        return [name, f"gate.{rest.replace('correction', 'e_score_correction')}"]
    if part == "shared_gate":
        return [name, "shared_expert_gate.weight"]
    matrix, kind = rest.split(".")
    if part == "shared":
        return [name, f"shared_expert.{matrix}_proj.{kind}", f"shared_experts.{matrix}_proj.{kind}"]
    suffix = "_bias" if kind == "bias" else ""
    names = [name, f"experts.{matrix}_proj{suffix}", f"experts.<e>.{matrix}_proj.{kind}"]
    if matrix != "down":
        names += [f"experts.gate_up.{kind}", f"experts.gate_up_proj{suffix}"]
    return [*names, *(f"experts.<e>.{short}.{kind}" for short, long in _MIXTRAL.items() if long == matrix)]


def _without_block(name: str) -> str:
    return next((name[len(block) :] for block in _BLOCKS if name.startswith(block)), name)


def _split(name: str) -> tuple[str, str]:
    """The name that the matrix would have as a plain array, and which part of it `name` is ("" for the plain array)."""
    if name in _CANONICAL:
        return name, ""
    module, _, last = name.rpartition(".")
    if last in _MODULE_PARTS:
        return f"{module}.weight", last
    if match := re.fullmatch(_PARAMETER_PARTS, name):
        return match[1], match[2]
    return name, ""


def _parse(name: str) -> _Name | None:
    if name in _CANONICAL:
        return _Name(name, None, False)
    if match := re.fullmatch(_ROUTER, name):
        return _Name(f"router.{match[1].removeprefix('e_score_')}", None, False)
    if match := re.fullmatch(_SHARED, name):
        return _Name(f"shared.{match[1]}.weight", None, False)
    if re.fullmatch(_SHARED_GATE, name):
        return _Name("shared_gate.weight", None, False)
    if match := re.fullmatch(_PARAMETER, name):
        return _Name(f"experts.{match[1]}.{'bias' if match[2] else 'weight'}", None, True)
    if match := re.fullmatch(_PER_EXPERT, name):
        return _Name(f"experts.{match[2] or _MIXTRAL[match[3]]}.{match[4]}", int(match[1]), False)
    return None


def _check_wanted(config: MoEConfig, entry: Given) -> None:
    """Refuse what belongs to a MoE layer, but not to this one, naming the field that decides."""
    shapes = weight_shapes(config)
    part, _, rest = entry.name.partition(".")
    if rest.endswith(".bias") and not config.expert_bias:
        reason = "expert_bias is False: set expert_bias=True"
    elif part == "shared" and not config.shared_intermediate:
        reason = "shared_intermediate is 0: set it to the shared expert's width"
    elif "gate" in rest and not config.gated:
        reason = f"activation={config.activation!r} has no gate: choose one of {', '.join(GATED_ACTIVATIONS)}"
    elif "gate_up" in rest or entry.name in shapes:
        reason = ""
    else:
        field = entry.name.removesuffix(".weight").replace("router.bias", "router_bias").replace("router.", "")
        reason = f"{field} is False: set {field}=True"
    if reason:
        raise WeightsError(f"weight {entry.key!r} has no place in this layer, whose {reason} or leave the weight out")
    if entry.expert is not None and entry.expert >= config.experts:
        raise WeightsError(f"{entry.key!r} is expert {entry.expert}, but experts={config.experts} (0 to {config.experts - 1})")


def _unknown(unknown: list[str], names: Mapping[str, str]) -> str:
    quantized = next((key for key in unknown if re.search(_QUANTIZED, key)), None)
    hint = _layers_hint(names)
    if quantized:
        hint = f" ({quantized!r} looks quantized in a way that is not understood: dequantize the weights first)"
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return f"unknown weight names: {', '.join(unknown[:8])}{more}{hint}"


def _layers_hint(names: Mapping[str, Any]) -> str:
    prefixes = [match[1] for key in names if (match := re.fullmatch(_LAYER_ROUTER, key))]
    if not prefixes:
        return ""
    return f"; layers are at prefix={', '.join(repr(p) for p in prefixes[:3])}{' ...' if len(prefixes) > 3 else ''}"
