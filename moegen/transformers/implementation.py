"""The experts implementation `moegen` of transformers: what is registered, and what a user does with a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import ConfigError, InputError
from .experts import parameter_names
from .operators import Differentiable, model_experts, run
from .packed import packed_of

NAME = "moegen"


def register() -> None:
    """Makes the implementation known to the library; importing `moegen.transformers` does it."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _fp8_experts_forward)


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the library calls in place of an experts module's own forward.

    Args:
        hidden_states: [T, H].
        top_k_index: integers [T, K].
        top_k_weights: floats [T, K].

    Raises:
        MoegenError: moegen cannot run these experts, or there is no artifact and none can be built.
    """
    if torch.is_grad_enabled() and _wants_gradients(self, hidden_states, top_k_weights):
        return _differentiable(self, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling():
        _begin(self)
        y: torch.Tensor = model_experts(hidden_states, top_k_index, top_k_weights, self._moegen.number)
        return y
    return run(packed_of(self), hidden_states, top_k_index, top_k_weights)


def _wants_gradients(module: Any, *values: torch.Tensor) -> bool:
    parameters = [getattr(module, name, None) for name in parameter_names(module)]
    return any(value is not None and value.requires_grad for value in (*values, *parameters))


@torch.compiler.disable
def _differentiable(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
    return Differentiable.apply(module, x, ids, weights, *(getattr(module, name) for name in parameter_names(module)))


@torch.compiler.assume_constant_result
def _begin(module: Any) -> int:
    """Gives the module a number while it is traced; compiled code then reads it from there, and guards it."""
    return packed_of(module).number


def _fp8_experts_forward(self: torch.nn.Module, *arguments: Any, **named: Any) -> torch.Tensor:
    raise ConfigError(
        f"quantization_config: {type(self).__name__} holds fp8 experts, which moegen does not run: use another experts "
        "implementation for this model, e.g. 'grouped_mm', or load it dequantized"
    )


def experts_of(model: torch.nn.Module) -> Iterator[Any]:
    """The modules of a model whose implementation the library lets be set (its `use_experts_implementation` made them)."""
    marks = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return (module for module in model.modules() if all(hasattr(module, mark) for mark in marks))


def pack(model: torch.nn.Module) -> int:
    """Finds or builds the artifacts of a model's experts and packs their weights, which its first call would do otherwise.

    Parameters that did not change since they were packed are not packed again.

    Returns:
        Bytes of all packed weights.

    Raises:
        InputError: the model has no experts that the library lets be replaced.
        MoegenError: moegen cannot run its experts, or there is no artifact and none can be built.
    """
    total = 0
    for module in experts_of(model):
        packed = packed_of(module)
        packed.layer(_top_k(module))
        total += packed.packed_bytes
    if not total:
        raise InputError(f"{type(model).__name__} has no experts whose implementation can be set")
    return total


def release(model: torch.nn.Module) -> int:
    """Packs a model's experts and gives the memory of their parameters back: from then on only moegen can run them.

    Whatever reads the parameters afterwards (saving, moving, training, another implementation) is an error that says so.

    Returns:
        Bytes of the parameters that were given back.

    Raises:
        InputError: the model has no experts, or they are not set to run on moegen.
        MoegenError: as of `pack`.
    """
    for module in experts_of(model):
        chosen = module.config._experts_implementation
        if chosen != NAME:
            raise InputError(f"the experts implementation is {chosen!r}: call model.set_experts_implementation({NAME!r}) first")
    pack(model)
    return sum(packed_of(module).release() for module in experts_of(model))


def _top_k(module: Any) -> int:
    """K, as the model's configuration calls it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
    found = next((value for name in names if isinstance(value := getattr(module.config, name, None), int)), None)
    if found is None:
        raise InputError(
            f"the configuration of {type(module).__name__} says in none of {', '.join(names)} how many experts a token visits: "
            "call the model once instead, which packs its weights too"
        )
    return found
