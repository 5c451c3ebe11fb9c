"""One weight of a layer out of the arrays that were given: found, checked, and turned output-first.

`moegen.weights` states which names and layouts are understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .arrays import FLOATS, HostArray, as_host_array
from .checkpoints import Stored, from_quantized, open_matrix
from .config import MoEConfig, weight_shapes
from .errors import WeightsError
from .naming import Given, spellings
from .quantization import Quantized

LAYOUTS = ("output_first", "input_first")
GATE_UPS = ("stacked", "interleaved")

Matrix = HostArray | Stored


class Loader:
    """Arrays by canonical name, checked and turned output-first."""

    def __init__(
        self,
        config: MoEConfig,
        weights: Mapping[str, Any],
        layout: str | None,
        gate_up: str | None,
        checkpoint_format: str | None,
    ) -> None:
        self.config, self.weights = config, weights
        self.layout, self.gate_up, self.checkpoint_format = layout, gate_up, checkpoint_format

    def load(self, name: str, given: Mapping[tuple[str, int | None], Given], prefix: str) -> Matrix | Sequence[Matrix]:
        """One of `weight_shapes`: an array over all experts, or one array per expert."""
        part, _, rest = name.partition(".")
        fused = f"experts.gate_up.{rest.split('.')[1]}" if part == "experts" and not rest.startswith("down") else ""
        entries = [entry for (n, _), entry in given.items() if n in (name, fused)]
        stacked = [entry for entry in entries if entry.expert is None]
        if not entries:
            codes = ", or codes and scales under those names" if self.config.low_bit and part in ("experts", "shared") else ""
            raise WeightsError(f"weight {name!r} is missing; looked for {', '.join(spellings(name))}{codes}{_under(prefix)}")
        if len({(entry.name, entry.expert is None) for entry in entries}) > 1:
            ways = {(entry.name, entry.expert is None): entry.key for entry in entries}
            raise WeightsError(f"weight {name!r} is there in more than one form: {', '.join(map(repr, ways.values()))}")
        if stacked:
            return self._stacked(name, stacked[0]) if self._is_stored(stacked[0]) else self._oriented(name, stacked[0])
        by_expert = {entry.expert: entry for entry in entries}
        missing = [e for e in range(self.config.experts) if e not in by_expert]
        if missing:
            example = entries[0]
            lost = re.sub(rf"(experts\.)0*{example.expert}\.", rf"\g<1>{missing[0]}.", example.key)
            more = f" ({len(missing)} of {self.config.experts} experts are)" if len(missing) > 1 else ""
            raise WeightsError(f"weight {lost!r} is missing{more}; experts={self.config.experts}: 0 to {self.config.experts - 1}")
        return [self._one(name, by_expert[e]) for e in range(self.config.experts)]

    def check_low_bit(self, entry: Given) -> None:
        """Refuse codes where the layer has none."""
        if not self.config.low_bit:
            raise WeightsError(
                f"weight {entry.key!r} is quantized, but the layer has weight_dtype='same': set weight_dtype and the fields beside "
                "it to the checkpoint's format (MoEConfig.from_hf reads it from config.json), or dequantize the weights first"
            )
        if not entry.name.startswith(("experts.", "shared.")) or not entry.name.endswith(".weight"):
            raise WeightsError(
                f"weight {entry.key!r} is quantized, which only the experts' projections may be: dequantize it first"
            )
        if self.layout == "input_first":
            raise WeightsError(f"weight {entry.key!r} is quantized along its inputs, which layout='input_first' cannot turn")

    def _is_stored(self, entry: Given) -> bool:
        return not entry.plain or isinstance(self.weights[entry.key], Quantized)

    def _one(self, name: str, entry: Given) -> Matrix:
        """One matrix or bias without the axis of the experts."""
        if not self._is_stored(entry):
            return self._oriented(name, entry)
        arrays = {part: self.weights[key] for part, key in entry.parts.items()}
        return self._stored(name, entry, arrays, f"weight {entry.key!r}")

    def _stacked(self, name: str, entry: Given) -> Matrix | Sequence[Matrix]:
        """The matrices of all experts out of gpt-oss' arrays, which are the only ones that have them all."""
        if not name.startswith("experts."):
            return self._one(name, entry)
        if "blocks" not in entry.parts:
            raise WeightsError(f"weight {entry.key!r} must be given for each expert by itself, as experts.<e>. and so on")
        arrays = {part: as_host_array(self.weights[key], f"weight {key!r}", WeightsError) for part, key in entry.parts.items()}
        for part, array in arrays.items():
            if array.shape[:1] != (self.config.experts,):
                raise WeightsError(
                    f"weight {entry.parts[part]!r} has shape {array.shape}, expected experts={self.config.experts} first"
                )
        return [
            self._stored(name, entry, {part: HostArray(a.data[e], a.dtype) for part, a in arrays.items()}, f"{entry.key!r}[{e}]")
            for e in range(self.config.experts)
        ]

    def _stored(self, name: str, entry: Given, arrays: Mapping[str, Any], label: str) -> Stored:
        self.check_low_bit(entry)
        n, k = weight_shapes(self.config)[name][-2:]
        halved = entry.name != name
        rows = 2 * n if halved else n
        value = arrays.get("")
        if isinstance(value, Quantized):
            if len(arrays) > 1:
                raise WeightsError(f"{label} is Quantized, and {', '.join(key for key in entry.parts.values())} are there as well")
            stored = from_quantized(value, self.config, rows, k, label)
        else:
            stored = open_matrix(arrays, self.config, rows, k, label, self.checkpoint_format)
        return stored.rows(self._half(name, entry)) if halved else stored

    def _half(self, name: str, entry: Given) -> slice:
        """The rows of gate or up in an array that has both."""
        which, width = int(name.startswith("experts.up")), self.config.intermediate
        if self._rule(entry)[1] == "interleaved":
            return slice(which, None, 2)
        return slice(which * width, (which + 1) * width)

    def _oriented(self, name: str, entry: Given) -> HostArray:
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
        layout, _ = self._rule(entry)
        if halved:
            expected[rows] *= 2
        swap = is_weight and layout == "input_first"
        if swap:
            expected[-2:] = reversed(expected[-2:])
        self._check_shape(entry, array, tuple(expected), layout if is_weight else "")
        data = array.data.swapaxes(-1, -2) if swap else array.data
        if halved:
            picked = self._half(name, entry)
            data = data[..., picked, :] if is_weight else data[..., picked]
        return HostArray(data, array.dtype)

    def _rule(self, entry: Given) -> tuple[str, str]:
        """(layout, gate_up) of an array of the routed experts; the module's docstring states the rule."""
        layout, gate_up = LAYOUTS[0], GATE_UPS[0]
        if entry.parameter:
            if self.config.expert_bias and self.config.activation == "swiglu_clamped":
                layout, gate_up = "input_first", "interleaved"
            elif self.config.weight_on_input:
                layout = "input_first"
        return self.layout or layout, self.gate_up or gate_up

    def _check_shape(self, entry: Given, array: HostArray, expected: tuple[int, ...], layout: str = "") -> None:
        if array.shape == expected:
            return
        hint = f" ({layout}; pass layout='...' for the other way round)" if layout else ""
        other = LAYOUTS[1 - LAYOUTS.index(layout)] if layout else ""
        if other and array.shape == (*expected[:-2], expected[-1], expected[-2]):
            hint = f" (it would fit with layout={other!r})"
        raise WeightsError(f"weight {entry.key!r} has shape {array.shape}, expected {expected}{hint}")


def _under(prefix: str) -> str:
    return f" under {prefix!r}" if prefix else ""
