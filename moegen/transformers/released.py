"""Parameters whose memory was given back after packing: they say so to whoever wants their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import WeightsError

# What concerns shape, type and place of a tensor, and what a module does with its parameters without reading them.
_ALLOWED = {
    "detach", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "ndimension", "nelement",
    "numel", "register_hook", "requires_grad_", "size", "storage_offset", "stride", "__get__", "__set__", "__hash__",
}  # fmt: skip


class Released(torch.Tensor):
    """A parameter without values: shape, dtype and name are what they were, and anything that reads it is an error."""

    @staticmethod
    def like(value: torch.Tensor) -> torch.nn.Parameter:
        """What takes the place of a parameter."""
        empty = torch.empty_like(value, device="meta", requires_grad=False)
        return torch.nn.Parameter(torch.Tensor._make_subclass(Released, empty), requires_grad=False)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuses every use of the values.

        Raises:
            WeightsError: always, but for what asks for shape, dtype and the like.
        """
        name = getattr(func, "__name__", str(func))
        if name in _ALLOWED:
            return super().__torch_function__(func, types, args, dict(kwargs or {}))
        raise WeightsError(
            f"{name}: the experts' parameters were released after packing (moegen.transformers.release), and only moegen can run "
            "them now: load the model again to save, move or change them, or for another experts implementation"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Released(shape={list(self.shape)}, dtype={self.dtype})"
