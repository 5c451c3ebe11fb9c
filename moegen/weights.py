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

**In few bits.** A layer whose `weight_dtype` is not "same" takes its projections as they are above, to be rounded when they are
packed, or in its own codes: as `moegen.quantization.Quantized` matrices under the name of one expert's matrix
(`experts.<e>.up.weight`) or of the shared expert's, or in a format of `moegen.checkpoints`, whose array names
`moegen.naming` lists. gpt-oss' blocks are output-first, gate and up rows interleaved.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import HostArray, as_host_array, to_float32
from .checkpoints import Stored, checkpoint_format_beside
from .config import MoEConfig, weight_shapes
from .errors import WeightsError
from .naming import select, understand
from .orientation import GATE_UPS, LAYOUTS, Loader, Matrix
from .quantization import Quantized, dequantize, quantize


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSource:
    """The checked weights of one layer, as views of the arrays they came in (any float dtype, any strides).

    `arrays` maps each name of `weight_shapes(config)` to one array or, for experts given one by one, to E arrays. Matrices in
    few bits are `Stored` there, which are unpacked whenever they are asked for.
    """

    config: MoEConfig
    arrays: Mapping[str, Matrix | Sequence[Matrix]]

    def router(self) -> dict[str, HostArray | None]:
        """weight [E, H], bias [E] or None, correction_bias [E] or None."""
        parts = {part: self.arrays.get(f"router.{part}") for part in ("weight", "bias", "correction_bias")}
        return {part: array if isinstance(array, HostArray) else None for part, array in parts.items()}

    def expert(self, e: int) -> dict[str, Any]:
        """gate [I, H], up [I, H], down [H, I], gate_bias [I], up_bias [I], down_bias [H]; absent ones are missing.

        Each is a `HostArray`, or for a projection that came in few bits a `Quantized`, checked.
        """
        if not 0 <= e < self.config.experts:
            raise WeightsError(f"expert {e} must be between 0 and {self.config.experts - 1}")
        views = {}
        for name in self.arrays:
            part, _, rest = name.partition(".")
            if part == "experts":
                views[rest.replace(".weight", "").replace(".bias", "_bias")] = _read(self._of_expert(name, e))
        return views

    def shared(self) -> dict[str, Any] | None:
        """gate [Is, H], up [Is, H], down [H, Is], shared_gate [1, H], each as those of `expert`; absent ones are missing.

        None without a shared expert.
        """
        if not self.config.shared_intermediate:
            return None
        names = {part: f"shared.{part}.weight" for part in ("gate", "up", "down")} | {"shared_gate": "shared_gate.weight"}
        return {part: _read(self._whole(name)) for part, name in names.items() if name in self.arrays}

    def to_float32(self) -> dict[str, npt.NDArray[np.float32]]:
        """Canonical name -> float32 array, as `moegen.reference` takes them; experts given one by one are stacked.

        The projections of a layer in few bits have the values that the layer computes with: what their codes stand for,
        which for those that came as floats are the codes that `moegen.quantization.quantize` gives them.
        """
        return {name: self._values(name) for name in self.arrays}

    def _values(self, name: str) -> npt.NDArray[np.float32]:
        array = self.arrays[name]
        rounded = self.config.low_bit and name.endswith(".weight") and name.startswith(("experts.", "shared."))
        if isinstance(array, HostArray) and not rounded:
            return to_float32(array)
        if name.startswith("shared."):
            return _meant(self._whole(name), self.config, rounded, name)
        values = np.empty(weight_shapes(self.config)[name], np.float32)
        for e, row in enumerate(values):
            row[...] = _meant(self._of_expert(name, e), self.config, rounded, f"expert {e} of {name}")
        return values

    def of_experts(self, config: MoEConfig, experts: Sequence[int]) -> WeightSource:
        """Some of the routed experts, in this order, as those of a layer `config` that has that many or more; nothing else.

        Args:
            experts: numbers of this layer's experts. Nothing of the others is read.
        """
        names = [name for name in self.arrays if name.startswith("experts.")]
        return WeightSource(config, {name: [self._of_expert(name, e) for e in experts] for name in names})

    def _of_expert(self, name: str, e: int) -> Matrix:
        array = self.arrays[name]
        return HostArray(array.data[e], array.dtype) if isinstance(array, HostArray) else _matrix(array, e)

    def _whole(self, name: str) -> Matrix:
        return _matrix(self.arrays[name])


def _matrix(array: Matrix | Sequence[Matrix], e: int = 0) -> Matrix:
    return array if isinstance(array, HostArray | Stored) else array[e]


def _read(array: Matrix) -> HostArray | Quantized:
    return array.read() if isinstance(array, Stored) else array


def _meant(array: Matrix, config: MoEConfig, rounded: bool, name: str) -> npt.NDArray[np.float32]:
    """The values that a layer computes with, float32."""
    if isinstance(array, HostArray) and not rounded:
        return to_float32(array)
    codes = array.read() if isinstance(array, Stored) else quantize(array, config, name)
    return dequantize(codes, config, np.float32)


def resolve(
    config: MoEConfig,
    weights: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    layout: str | None = None,
    gate_up: str | None = None,
    checkpoint_format: str | None = None,
) -> WeightSource:
    """Find, check and orient the weights of one layer, without copying or reading them.

    Args:
        weights: names to arrays (NumPy, torch, DLPack), or the path of a .safetensors file, of an index of shards, or of a
            folder with either.
        prefix: selects the names that start with it, e.g. "model.layers.3.mlp."; every name that it selects must belong to
            the layer.
        layout: "output_first" or "input_first" for the matrices of the routed experts; see above for the default.
        gate_up: "stacked" or "interleaved" for those that hold gate and up in one.
        checkpoint_format: "gptq" or "gptq_v2", which say how GPTQ's zero points are stored; where it is left out, what the
            config.json beside the file says, else as `moegen.checkpoints.open_matrix` decides.

    Raises:
        WeightsError: a name is missing, superfluous or there twice, an array has the wrong shape or dtype or is not in host
            memory, the file is malformed, or codes and scales are not those that the configuration says.
    """
    for argument, value, allowed in (("layout", layout, LAYOUTS), ("gate_up", gate_up, GATE_UPS)):
        if value is not None and value not in allowed:
            raise WeightsError(f"{argument}={value!r} must be one of {', '.join(allowed)}")
    if isinstance(weights, str | os.PathLike):
        from .safetensors import open_safetensors  # here, because binding arrays should not pay for reading files

        checkpoint_format = checkpoint_format or (checkpoint_format_beside(Path(os.fsdecode(weights))) if config.low_bit else None)
        weights = open_safetensors(weights)
    if not isinstance(weights, Mapping):
        raise WeightsError(
            f"weights must be a mapping of names to arrays or a path, not {type(weights).__name__} "
            "(a torch module has .state_dict())"
        )
    given = understand(config, _without_zero_biases(config, select(weights, prefix), weights))
    loader = Loader(config, weights, layout, gate_up, checkpoint_format)
    for entry in given.values():
        if not entry.plain:
            loader.check_low_bit(entry)
    return WeightSource(config, {name: loader.load(name, given, prefix) for name in weight_shapes(config)})


def _without_zero_biases(config: MoEConfig, names: Mapping[str, str], weights: Mapping[str, Any]) -> dict[str, str]:
    """`names` without the biases of zeros that AutoGPTQ gives to modules that have none."""
    packed = {name.removesuffix(".qweight") for name in names.values() if name.endswith(".qweight")}
    kept = {}
    for key, name in names.items():
        module = name.removesuffix(".bias")
        wanted = config.expert_bias and module.startswith("experts.")
        if module == name or module not in packed or wanted or as_host_array(weights[key], repr(key), WeightsError).data.any():
            kept[key] = name
    return kept
