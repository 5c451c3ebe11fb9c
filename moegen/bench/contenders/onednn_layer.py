"""torch's strongest way on a CPU: oneDNN products with every expert's weights packed in advance, as inductor's freezing does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...arrays import HostArray
from .family import Family, Settings
from .torch_layer import TorchBase

_TYPICAL_ROWS = 64


class OnednnLayer(TorchBase):
    """The only copy of the routed experts' weights is the packed one."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, ("torch-onednn",))
        if self.obstacles:
            return
        if not torch.backends.mkldnn.is_available():
            self.obstacles = {"torch-onednn": "this torch was built without oneDNN"}
            return
        try:
            self.packed = [self._packed(e) for e in range(self.config.experts)]
        except RuntimeError as error:  # bfloat16 on a processor that oneDNN has no instructions of
            self.obstacles = {"torch-onednn": f"oneDNN packs no {self.config.dtype} weights here: {str(error).splitlines()[0]}"}
            return
        self.gate_up_bias, self.down_bias = self.biases()
        self.calls = {"torch-onednn": self.called(self._experts)}

    def _packed(self, e: int) -> tuple[Any, Any]:
        parts = ("gate", "up") if self.config.gated else ("up",)
        first = np.concatenate([self.given[f"experts.{part}.weight"].data[e] for part in parts])
        pair = (first, self.given["experts.down.weight"].data[e].copy())
        pack = torch.ops.mkldnn._reorder_linear_weight
        gate_up, down = (pack(self.wrap(HostArray(part, self.config.dtype)), _TYPICAL_ROWS) for part in pair)
        return gate_up, down

    def _experts(self, x: Any, ids: Any, weights: Any) -> Any:
        linear = torch.ops.mkldnn._linear_pointwise
        rows, order, factors, ends = self.by_expert(x, ids, weights)
        y, start = torch.empty_like(rows), 0
        for e, end in enumerate(ends.tolist()):
            if end == start:
                continue
            gate_up, down = self.packed[e]
            bias = (None, None) if self.down_bias is None else (self.gate_up_bias[e], self.down_bias[e])
            h = self.activate(linear(rows[start:end], gate_up, bias[0], "none", [], ""))
            y[start:end] = linear(h, down, bias[1], "none", [], "")
            start = end
        return self.combined(y, order, factors)


def open_family(settings: Settings) -> Family:
    """torch with the experts' weights in oneDNN's own layout."""
    return OnednnLayer(settings)
