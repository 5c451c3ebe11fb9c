"""From the names and layouts that people have to one expert's matrices, as views.

Canonical names, output features first as in torch's Linear (`moegen.reference.weight_shapes`): router.weight [E, H],
router.bias [E], router.correction_bias [E], experts.{gate,up}.weight [E, I, H], experts.down.weight [E, H, I] and their .bias,
shared.{gate,up,down}.weight, shared_gate.weight [1, H]. Besides these:

* experts.gate_up.weight [E, 2I, H] and .bias [E, 2I]: gate and up in one, gate rows first;
* `experts.<e>.` before a matrix's name: one array per expert;
* the names of the model types in `moegen.hf`, as on the hub and as in transformers 5's modules;
* all of these after `mlp.`, `block_sparse_moe.`, `feed_forward.` or `mixer.`.

**Which way round.** Names ending in .weight are output-first. transformers' bare parameters (`experts.gate_up_proj`,
`experts.down_proj`, ...) follow the model that the configuration is like, never the shape, which cannot tell when 2I == H:

* gpt-oss (`expert_bias` and `swiglu_clamped`): input-first [E, H, 2I], gate and up columns interleaved;
* Llama 4 (`weight_on_input`): input-first [E, H, 2I], gate columns first;
* all others: output-first [E, 2I, H], gate rows first.

`layout` and `gate_up` override this for every matrix of the routed experts.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import FLOATS, HostArray, as_host_array, to_float32
from .config import GATED_ACTIVATIONS, MoEConfig, weight_shapes
from .errors import WeightsError

LAYOUTS = ("output_first", "input_first")
GATE_UPS = ("stacked", "interleaved")

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
_QUANTIZED = r"_blocks$|_scales?(?:_inv)?$|\.qweight$|\.qzeros$|_packed$"
_LAYER_ROUTER = r"(.+\.)(?<!experts\.)(?<!shared\.)(?<!\d\.)(?:gate|router)\.weight"


class _Given(NamedTuple):
    """One name of the mapping, understood."""

    key: str  # as in the mapping
    name: str  # canonical, but "gate_up" may stand for gate and up
    expert: int | None  # None: all experts in one array
    parameter: bool  # one of transformers' bare parameters, whose layout depends on the model


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSource:
    """The checked weights of one layer, as views of the arrays they came in (any float dtype, any strides).

    `arrays` maps each name of `weight_shapes(config)` to one array or, for experts given one by one, to E arrays.
    """

    config: MoEConfig
    arrays: Mapping[str, HostArray | Sequence[HostArray]]

    def router(self) -> dict[str, HostArray | None]:
        """weight [E, H], bias [E] or None, correction_bias [E] or None."""
        return {part: self._whole(f"router.{part}") for part in ("weight", "bias", "correction_bias")}

    def expert(self, e: int) -> dict[str, HostArray]:
        """gate [I, H], up [I, H], down [H, I], gate_bias [I], up_bias [I], down_bias [H]; absent ones are missing."""
        if not 0 <= e < self.config.experts:
            raise WeightsError(f"expert {e} must be between 0 and {self.config.experts - 1}")
        views = {}
        for name, array in self.arrays.items():
            part, _, rest = name.partition(".")
            if part == "experts":
                view = HostArray(array.data[e], array.dtype) if isinstance(array, HostArray) else array[e]
                views[rest.replace(".weight", "").replace(".bias", "_bias")] = view
        return views

    def shared(self) -> dict[str, HostArray] | None:
        """gate [Is, H], up [Is, H], down [H, Is], shared_gate [1, H]; absent ones are missing. None without a shared expert."""
        if not self.config.shared_intermediate:
            return None
        parts = {name: self._whole(f"shared.{name}.weight") for name in ("gate", "up", "down")}
        parts["shared_gate"] = self._whole("shared_gate.weight")
        return {name: array for name, array in parts.items() if array is not None}

    def to_float32(self) -> dict[str, npt.NDArray[np.float32]]:
        """Canonical name -> float32 array, as `moegen.reference` takes them; experts given one by one are stacked."""
        return {
            name: to_float32(a) if isinstance(a, HostArray) else np.stack([to_float32(one) for one in a])
            for name, a in self.arrays.items()
        }

    def _whole(self, name: str) -> HostArray | None:
        array = self.arrays.get(name)
        return array if isinstance(array, HostArray) else None


def resolve(
    config: MoEConfig,
    weights: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    layout: str | None = None,
    gate_up: str | None = None,
) -> WeightSource:
    """Find, check and orient the weights of one layer, without copying or reading them.

    Args:
        weights: names to arrays (NumPy, torch, DLPack), or the path of a .safetensors file, of an index of shards, or of a
            folder with either.
        prefix: selects the names that start with it, e.g. "model.layers.3.mlp."; every name that it selects must belong to
            the layer.
        layout: "output_first" or "input_first" for the matrices of the routed experts; see above for the default.
        gate_up: "stacked" or "interleaved" for those that hold gate and up in one.

    Raises:
        WeightsError: a name is missing, superfluous or there twice, an array has the wrong shape or dtype or is not in host
            memory, or the file is malformed.
    """
    for argument, value, allowed in (("layout", layout, LAYOUTS), ("gate_up", gate_up, GATE_UPS)):
        if value is not None and value not in allowed:
            raise WeightsError(f"{argument}={value!r} must be one of {', '.join(allowed)}")
    if isinstance(weights, str | os.PathLike):
        from .safetensors import open_safetensors  # here, because binding arrays should not pay for reading files

        weights = open_safetensors(weights)
    if not isinstance(weights, Mapping):
        raise WeightsError(
            f"weights must be a mapping of names to arrays or a path, not {type(weights).__name__} "
            "(a torch module has .state_dict())"
        )
    given = _understand(config, _select(weights, prefix))
    loader = _Loader(config, weights, layout, gate_up)
    return WeightSource(config, {name: loader.load(name, given, prefix) for name in weight_shapes(config)})


# ---------------------------------------------------------------- names


def _select(weights: Mapping[str, Any], prefix: str) -> dict[str, str]:
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


def _understand(config: MoEConfig, names: Mapping[str, str]) -> dict[tuple[str, int | None], _Given]:
    """(canonical name, expert) -> where it is given, refusing names that the layer has no use for."""
    given: dict[tuple[str, int | None], _Given] = {}
    unknown = []
    for key, name in names.items():
        entry = _parse(key, name)
        if entry is None:
            unknown.append(key)
            continue
        _check_wanted(config, entry)
        other = given.setdefault((entry.name, entry.expert), entry)
        if other is not entry:
            raise WeightsError(f"{other.key!r} and {key!r} are both {entry.name!r}")
    if unknown:
        quantized = next((key for key in unknown if re.search(_QUANTIZED, key)), None)
        hint = f" ({quantized!r} looks quantized: dequantize the weights first)" if quantized else _layers_hint(names)
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise WeightsError(f"unknown weight names: {', '.join(unknown[:8])}{more}{hint}")
    return given


def _without_block(name: str) -> str:
    return next((name[len(block) :] for block in _BLOCKS if name.startswith(block)), name)


def _parse(key: str, name: str) -> _Given | None:
    if name in _CANONICAL:
        return _Given(key, name, None, False)
    if match := re.fullmatch(_ROUTER, name):
        return _Given(key, f"router.{match[1].removeprefix('e_score_')}", None, False)
    if match := re.fullmatch(_SHARED, name):
        return _Given(key, f"shared.{match[1]}.weight", None, False)
    if re.fullmatch(_SHARED_GATE, name):
        return _Given(key, "shared_gate.weight", None, False)
    if match := re.fullmatch(_PARAMETER, name):
        return _Given(key, f"experts.{match[1]}.{'bias' if match[2] else 'weight'}", None, True)
    if match := re.fullmatch(_PER_EXPERT, name):
        return _Given(key, f"experts.{match[2] or _MIXTRAL[match[3]]}.{match[4]}", int(match[1]), False)
    return None


def _check_wanted(config: MoEConfig, entry: _Given) -> None:
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


def _layers_hint(names: Mapping[str, Any]) -> str:
    prefixes = [match[1] for key in names if (match := re.fullmatch(_LAYER_ROUTER, key))]
    if not prefixes:
        return ""
    return f"; layers are at prefix={', '.join(repr(p) for p in prefixes[:3])}{' ...' if len(prefixes) > 3 else ''}"


# ---------------------------------------------------------------- arrays


class _Loader:
    """Arrays by canonical name, checked and turned output-first."""

    def __init__(self, config: MoEConfig, weights: Mapping[str, Any], layout: str | None, gate_up: str | None) -> None:
        self.config, self.weights = config, weights
        self.layout, self.gate_up = layout, gate_up

    def load(self, name: str, given: Mapping[tuple[str, int | None], _Given], prefix: str) -> HostArray | list[HostArray]:
        """One of `weight_shapes`: an array over all experts, or one array per expert."""
        part, _, rest = name.partition(".")
        fused = f"experts.gate_up.{rest.split('.')[1]}" if part == "experts" and not rest.startswith("down") else ""
        entries = [entry for (n, _), entry in given.items() if n in (name, fused)]
        stacked = [entry for entry in entries if entry.expert is None]
        if not entries:
            raise WeightsError(f"weight {name!r} is missing; looked for {', '.join(_spellings(name))}{_under(prefix)}")
        if len({(entry.name, entry.expert is None) for entry in entries}) > 1:
            ways = {(entry.name, entry.expert is None): entry.key for entry in entries}
            raise WeightsError(f"weight {name!r} is there in more than one form: {', '.join(map(repr, ways.values()))}")
        if stacked:
            return self._oriented(name, stacked[0])
        by_expert = {entry.expert: entry for entry in entries}
        missing = [e for e in range(self.config.experts) if e not in by_expert]
        if missing:
            example = entries[0]
            lost = re.sub(rf"(experts\.)0*{example.expert}\.", rf"\g<1>{missing[0]}.", example.key)
            more = f" ({len(missing)} of {self.config.experts} experts are)" if len(missing) > 1 else ""
            raise WeightsError(f"weight {lost!r} is missing{more}; experts={self.config.experts}: 0 to {self.config.experts - 1}")
        return [self._oriented(name, by_expert[e]) for e in range(self.config.experts)]

    def _oriented(self, name: str, entry: _Given) -> HostArray:
        """[E, out, in] or [out, in], a bias without `in`; gate or up alone where the array has both."""
        array = as_host_array(self.weights[entry.key], f"weight {entry.key!r}", WeightsError)
        if array.dtype not in FLOATS:
            raise WeightsError(f"weight {entry.key!r} has dtype {array.dtype}, expected one of {', '.join(FLOATS)}")
        expected = list(weight_shapes(self.config)[name])
        if not name.startswith("experts."):
            self._check_shape(entry, array, tuple(expected))
            return array
        if entry.expert is not None:
            del expected[0]
        is_weight, halved = name.endswith(".weight"), entry.name != name
        rows = -2 if is_weight else -1
        layout, gate_up = self._rule(entry)
        if halved:
            expected[rows] *= 2
        swap = is_weight and layout == "input_first"
        if swap:
            expected[-2:] = reversed(expected[-2:])
        self._check_shape(entry, array, tuple(expected), layout if is_weight else "")
        data = array.data.swapaxes(-1, -2) if swap else array.data
        if halved:
            which, width = int(name.startswith("experts.up")), self.config.intermediate
            picked = slice(which, None, 2) if gate_up == "interleaved" else slice(which * width, (which + 1) * width)
            data = data[..., picked, :] if is_weight else data[..., picked]
        return HostArray(data, array.dtype)

    def _rule(self, entry: _Given) -> tuple[str, str]:
        """(layout, gate_up) of an array of the routed experts; the module's docstring states the rule."""
        layout, gate_up = LAYOUTS[0], GATE_UPS[0]
        if entry.parameter:
            if self.config.expert_bias and self.config.activation == "swiglu_clamped":
                layout, gate_up = "input_first", "interleaved"
            elif self.config.weight_on_input:
                layout = "input_first"
        return self.layout or layout, self.gate_up or gate_up

    def _check_shape(self, entry: _Given, array: HostArray, expected: tuple[int, ...], layout: str = "") -> None:
        if array.shape == expected:
            return
        hint = f" ({layout}; pass layout='...' for the other way round)" if layout else ""
        other = LAYOUTS[1 - LAYOUTS.index(layout)] if layout else ""
        if other and array.shape == (*expected[:-2], expected[-1], expected[-2]):
            hint = f" (it would fit with layout={other!r})"
        raise WeightsError(f"weight {entry.key!r} has shape {array.shape}, expected {expected}{hint}")


def _spellings(name: str) -> list[str]:
    """The names under which a canonical weight is looked for."""
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


def _under(prefix: str) -> str:
    return f" under {prefix!r}" if prefix else ""
