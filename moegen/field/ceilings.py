"""The two limits of a device, measured with what NVIDIA offers: a large product by cuBLAS and a large copy, on random data."""

from __future__ import annotations

from typing import Any

import torch

from .capture import Replay

_SIDE = 8192
_COPIED_BYTES = 2 << 30


class Ceilings:
    """Operands for both, in the device's memory for as long as this lives.

    Args:
        dtype: of the product.
    """

    def __init__(self, device: str, dtype: Any = torch.bfloat16) -> None:
        a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
        given = torch.randint(0, 255, (_COPIED_BYTES,), dtype=torch.uint8, device=device)
        to = torch.empty_like(given)
        self._product = Replay([lambda: a @ b.T])
        self._copy = Replay([lambda: to.copy_(given)])

    def sample(self, repeats: int = 3) -> dict[str, float]:
        """`flops_per_s`, a multiply-add being two, and `bytes_per_s`, read and written ones counted."""
        return {
            "flops_per_s": 2.0 * _SIDE**3 / self._product.seconds(repeats),
            "bytes_per_s": 2.0 * _COPIED_BYTES / self._copy.seconds(repeats),
        }
