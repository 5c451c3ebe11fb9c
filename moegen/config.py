"""The layer the user asks for: `MoEConfig`, frozen, checked when it is made.

Sizes follow one alphabet: T tokens, E experts, K top-k, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .storage import ACTIVATION_DTYPES, SCALE_DTYPES, WEIGHT_DTYPES, WEIGHT_GROUPS

if TYPE_CHECKING:
    from fractions import Fraction

DTYPES = ("float32", "bfloat16", "float16")
GATED_ACTIVATIONS = ("swiglu", "reglu", "geglu", "geglu_tanh", "swiglu_clamped")
UNGATED_ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
ACTIVATIONS = GATED_ACTIVATIONS + UNGATED_ACTIVATIONS
GATINGS = ("softmax", "topk_softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")

MAX_EXPERTS = 4096
MAX_TOP_K = 64
MAX_WIDTH = 1 << 20
MAX_SCALE = 1e6


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Everything that decides what a Mixture-of-Experts layer computes.

    Args:
        experts: E, number of routed experts.
        top_k: K, experts that each token visits.
        hidden: H, width of the layer's input and output.
        intermediate: I, width inside an expert; 4*H when left out.
        dtype: storage type of activations and weights; sums are float32 for all three.
        activation: gated (`swiglu`, `reglu`, `geglu` exact, `geglu_tanh`, `swiglu_clamped` of gpt-oss) or
            ungated (`relu`, `relu2`, `gelu` exact, `gelu_tanh`, `silu`).
        gating: `softmax` over all experts, then top-k (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2);
            `topk_softmax`: top-k, then softmax over the selected (gpt-oss);
            `sigmoid` of each logit (DeepSeek-V3, GLM-4-MoE, Llama 4).
        renormalize: divide the selected weights by their sum (`topk_softmax` sums to one anyway).
        routed_scaling: factor on the routing weights, after renormalisation.
        router_bias: the router has a bias [E] on its logits.
        correction_bias: a bias [E] on the scores that decides the selection only (DeepSeek-V3, arXiv:2412.19437).
        n_group, topk_group: experts form `n_group` equal groups, of which the best `topk_group` may be selected.
        group_score: how a group is scored: `top2_sum` (DeepSeek-V3) or `max` (DeepSeek-V2).
        weight_on_input: the routing weight multiplies the expert's input instead of its output (Llama 4).
        expert_bias: experts have biases.
        shared_intermediate: width of the shared expert that every token visits; 0 for none.
        shared_gate: the shared expert's output is scaled by sigmoid(x @ shared_gate.T) (Qwen2-MoE).
        capacity_factor: an expert takes at most ceil(capacity_factor * T * K / E) tokens, the first by position
            (GShard, arXiv:2006.16668; Switch, arXiv:2101.03961); None for no limit.
        swiglu_alpha, swiglu_limit: constants of `swiglu_clamped`.
        balance_coefficient: base of the adaptive load-balancing coefficient, base * (1 + variance of expert usage).
        weight_dtype: how the experts' projections are stored, the shared expert's among them: `same` as dtype, `int8` or `int4`
            (scale * (code - zero point)), or `mxfp4` (4-bit floats, a power of two for each 32; OCP Microscaling v1.0, gpt-oss).
        weight_group: consecutive terms of a dot product that share a scale: 32, 64, 128, or 0 for all of them, which int4 reads as
            128 and mxfp4 as 32.
        weight_zero_point: int8 and int4 codes have a zero point for each scale.
        scale_dtype: type in which scales are stored, except those of mxfp4.
        activation_dtype: what the experts' products multiply weights with: rows of `same` type as dtype, or rows rounded to `int8`
            with a scale for each token, which needs int8 weights.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and the limit.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int = 0
    dtype: str = "float32"
    activation: str = "swiglu"
    gating: str = "softmax"
    renormalize: bool = True
    routed_scaling: float = 1.0
    router_bias: bool = False
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    weight_on_input: bool = False
    expert_bias: bool = False
    shared_intermediate: int = 0
    shared_gate: bool = False
    capacity_factor: float | None = None
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    balance_coefficient: float = 0.01
    weight_dtype: str = "same"
    weight_group: int = 0
    weight_zero_point: bool = False
    scale_dtype: str = "float16"
    activation_dtype: str = "same"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        if self.intermediate == 0:
            object.__setattr__(self, "intermediate", 4 * self.hidden)
        _between("experts", self.experts, 1, MAX_EXPERTS)
        _between("top_k", self.top_k, 1, min(self.experts, MAX_TOP_K), "the number of experts" if self.experts < MAX_TOP_K else "")
        _between("hidden", self.hidden, 1, MAX_WIDTH)
        _between("intermediate", self.intermediate, 1, MAX_WIDTH)
        _between("shared_intermediate", self.shared_intermediate, 0, MAX_WIDTH)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("gating", self.gating, GATINGS)
        _one_of("group_score", self.group_score, GROUP_SCORES)
        self._check_groups()
        self._check_scales()
        self._check_low_bit()
        if self.shared_gate and not self.shared_intermediate:
            raise ConfigError("shared_gate=True needs a shared expert: set shared_intermediate above 0 (it is 0)")
        if self.correction_bias and self.gating == "topk_softmax":
            raise ConfigError("correction_bias=True goes with gating 'softmax' or 'sigmoid', not 'topk_softmax'")

    def _check_groups(self) -> None:
        _between("n_group", self.n_group, 1, self.experts, "the number of experts")
        if self.experts % self.n_group:
            raise ConfigError(f"n_group={self.n_group} must divide experts={self.experts} into equal groups")
        _between("topk_group", self.topk_group, 1, self.n_group, "n_group")
        reachable = self.topk_group * self.group_size
        if self.top_k > reachable:
            raise ConfigError(
                f"top_k={self.top_k} is more than the {reachable} experts in topk_group={self.topk_group} groups "
                f"of {self.group_size}"
            )
        if self.n_group > 1 and self.group_score == "top2_sum" and self.group_size < 2:
            raise ConfigError(
                f"group_score='top2_sum' needs groups of at least 2 experts; n_group={self.n_group} leaves {self.group_size}"
            )
        if self.n_group > 1 and self.gating == "topk_softmax":
            raise ConfigError(f"n_group={self.n_group} goes with gating 'softmax' or 'sigmoid', not 'topk_softmax'")

    def _check_scales(self) -> None:
        for name in ("routed_scaling", "swiglu_alpha", "swiglu_limit", "balance_coefficient", "capacity_factor"):
            value = getattr(self, name)
            if value is None:
                continue
            if not 1 / MAX_SCALE <= value <= MAX_SCALE:
                raise ConfigError(f"{name}={value} must be between {1 / MAX_SCALE:g} and {MAX_SCALE:g}")

    def _check_low_bit(self) -> None:
        _one_of("weight_dtype", self.weight_dtype, WEIGHT_DTYPES)
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _one_of("activation_dtype", self.activation_dtype, ACTIVATION_DTYPES)
        if self.weight_group not in WEIGHT_GROUPS:
            raise ConfigError(f"weight_group={self.weight_group} must be one of {', '.join(map(str, WEIGHT_GROUPS))}")
        if self.weight_group == 0 and self.weight_dtype in ("int4", "mxfp4"):
            object.__setattr__(self, "weight_group", 32 if self.weight_dtype == "mxfp4" else 128)
        if self.weight_dtype == "mxfp4" and self.weight_group != 32:
            raise ConfigError(f"weight_group={self.weight_group} must be 32 with weight_dtype='mxfp4'")
        if self.weight_dtype == "same" and self.weight_group:
            raise ConfigError(f"weight_group={self.weight_group} goes with weight_dtype 'int8', 'int4' or 'mxfp4', not 'same'")
        if self.weight_zero_point and self.weight_dtype not in ("int8", "int4"):
            raise ConfigError(f"weight_zero_point=True goes with weight_dtype 'int8' or 'int4', not {self.weight_dtype!r}")
        if self.activation_dtype == "int8" and self.weight_dtype != "int8":
            raise ConfigError(f"activation_dtype='int8' goes with weight_dtype 'int8', not {self.weight_dtype!r}")

    @property
    def low_bit(self) -> bool:
        """Whether the experts' projections are stored as codes and scales."""
        return self.weight_dtype != "same"

    @property
    def whole(self) -> MoEConfig:
        """The same layer with every weight in its dtype."""
        return dataclasses.replace(self, weight_dtype="same", weight_group=0, weight_zero_point=False, activation_dtype="same")

    @property
    def gated(self) -> bool:
        """Whether experts have a gate next to their up projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def group_size(self) -> int:
        """Experts in one routing group."""
        return self.experts // self.n_group

    @property
    def selects_by_logit(self) -> bool:
        """Whether experts are chosen on the logits themselves: every score is then monotone in its logit."""
        return not self.correction_bias and (self.n_group == 1 or self.group_score == "max")

    def capacity(self, tokens: int) -> int:
        """Most tokens that one expert takes out of T=`tokens`: ceil(capacity_factor * T * K / E), or T without a limit."""
        if self.capacity_factor is None:
            return tokens
        return min(tokens, math.ceil(self.capacity_per_token * tokens))

    @property
    def capacity_per_token(self) -> Fraction:
        """capacity_factor * K / E, exact: a factor of 1.1 means 11/10, so that ceil() never sees a rounding error."""
        from fractions import Fraction  # here, because only layers with a capacity need it

        return Fraction(str(self.capacity_factor)) * self.top_k / self.experts

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MoEConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is unknown, missing or impossible.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(fields) - known))
        if unknown:
            raise ConfigError(f"unknown configuration field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = [n for n in ("experts", "top_k", "hidden") if n not in fields]
        if missing:
            raise ConfigError(f"configuration field {missing[0]!r} is required")
        return cls(**fields)

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> MoEConfig:
        """The MoE layer of a Hugging Face model, from its `config.json` (a file, its folder, or the parsed dict).

        Understands the model types in `moegen.hf.MODEL_TYPES`.

        Raises:
            ConfigError: the model type is unknown, or a field asks for what moegen cannot honour.
        """
        from . import hf  # here, because loading an artifact should not pay for reading model configurations

        return cls(**hf.fields_from_hf(source))

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"MoEConfig({', '.join(shown)})"


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the plain Python type that the field declares, or a ConfigError that says what was expected."""
    declared = str(field.type)
    plain = value.item() if isinstance(value, np.generic) else value
    if declared.endswith("| None") and plain is None:
        return None
    exact = {"bool": bool, "int": int, "str": str}.get(declared)
    if exact is not None and type(plain) is exact:
        return plain
    if exact is None and type(plain) in (int, float):
        try:
            return float(plain)
        except OverflowError:
            raise ConfigError(f"{field.name} is too large for a float") from None
    raise ConfigError(f"{field.name}={value!r} must be of type {declared}, not {type(value).__name__}")


def _between(name: str, value: int, low: int, high: int, why: str = "") -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} must be between {low} and {high}{f' ({why})' if why else ''}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def weight_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all weights that `config` calls for; projections are [out, in], applied as x @ w.T."""
    e, h, i, s = config.experts, config.hidden, config.intermediate, config.shared_intermediate
    projections = ("gate", "up", "down") if config.gated else ("up", "down")
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (e, h)}
    if config.router_bias:
        shapes["router.bias"] = (e,)
    if config.correction_bias:
        shapes["router.correction_bias"] = (e,)
    for name in projections:
        shapes[f"experts.{name}.weight"] = (e, h, i) if name == "down" else (e, i, h)
    if config.expert_bias:
        for name in projections:
            shapes[f"experts.{name}.bias"] = (e, h) if name == "down" else (e, i)
    if s:
        for name in projections:
            shapes[f"shared.{name}.weight"] = (h, s) if name == "down" else (s, h)
    if config.shared_gate:
        shapes["shared_gate.weight"] = (1, h)
    return shapes


def config_key(config: MoEConfig) -> str:
    """Canonical JSON of a configuration, for hashing and comparing."""
    return json.dumps(config.to_dict(), sort_keys=True)
