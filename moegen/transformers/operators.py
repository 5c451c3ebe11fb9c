"""The routed experts of a model as an operator of torch, so that torch.compile and torch.export pass through them.

    moegen::model_experts(Tensor x, Tensor ids, Tensor weights, SymInt number) -> Tensor

x [T, H], ids [T, K] integers, weights [T, K] floats; `number` stands for one experts module (`moegen.transformers.packed`), whose
parameters the operator looks at when it is called. Gradients do not pass through it, but through `Differentiable`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ..errors import InputError
from .packed import numbered, packed_of


@torch.library.custom_op("moegen::model_experts", mutates_args=(), device_types=("cpu", "cuda"))
def model_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int) -> torch.Tensor:
    """The routed experts with the model's routing."""
    return run(numbered(number), x, ids, weights)


@model_experts.register_fake
def _(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def run(packed: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the experts make of x [T, H], in x's dtype.

    Raises:
        MoegenError: moegen cannot run these experts, or the arguments do not fit them.
    """
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise InputError(f"ids have shape {list(ids.shape)} and weights {list(weights.shape)}: expected [T, K] of both")
    layer = packed.layer(int(ids.shape[-1]))
    dtype = getattr(torch, layer.config.dtype)
    if x.is_cuda:  # what the device's kernels take, without asking it
        ids, weights = ids.to(torch.int32), weights.to(torch.float32)
    y: torch.Tensor = layer.experts(x.detach().to(dtype), ids, weights.detach())
    return y.to(x.dtype)


class Differentiable(torch.autograd.Function):
    """Forward by the artifact; backward by torch, through the library's own grouped products, computed again."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        """`parameters` are the module's own; they are arguments so that autograd asks for their gradients."""
        ctx.module = module
        ctx.save_for_backward(x, ids, weights, *parameters)
        return run(packed_of(module), x, ids, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, of the routing weights and of the parameters, where they are wanted."""
        x, ids, weights, *parameters = ctx.saved_tensors  # which refuses parameters that were changed in between
        with torch.enable_grad():
            x, weights = (value.detach().requires_grad_(True) for value in (x, weights))
            y = grouped_mm_experts_forward(ctx.module, x, ids, weights)
        inputs = [x, ids, weights, *parameters]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], gradients, allow_unused=True)
        every: list[torch.Tensor | None] = [None] * (1 + len(inputs))
        for i, gradient in zip(wanted, found, strict=True):
            every[1 + i] = gradient
        return tuple(every)
