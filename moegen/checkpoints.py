"""One matrix [n, k] of a checkpoint in few bits: recognised and checked when weights are bound, unpacked when it is asked for.

`open_matrix` checks everything that the names, types and shapes of the arrays can tell (`moegen.formats` states the formats);
`Stored.read` is the first to touch the codes, so that memory stays near one matrix whatever the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import as_host_array
from .config import MoEConfig
from .errors import WeightsError
from .formats import GPTQ_FORMATS, Parts, Reader
from .quantization import Quantized, check


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A matrix [n, k] in few bits whose arrays have been understood, but not read.

    `rows` picks some of its n rows, `read` unpacks them and checks the values.
    """

    name: str
    config: MoEConfig
    n: int
    k: int
    load: Reader
    picked: slice = dataclasses.field(default_factory=lambda: slice(None))

    def rows(self, picked: slice) -> Stored:
        """The same matrix, of which only these rows will be read."""
        return dataclasses.replace(self, picked=picked)

    def read(self) -> Quantized:
        """The codes and scales, unpacked; nothing is kept.

        Raises:
            WeightsError: a value is out of range, or contradicts the configuration.
        """
        quantized = self.load(self.picked)
        check(quantized, self.config, len(range(self.n)[self.picked]), self.k, self.name)
        return quantized


def from_quantized(quantized: Quantized, config: MoEConfig, n: int, k: int, name: str) -> Stored:
    """A matrix that the caller has quantized already.

    Raises:
        WeightsError: its shape is not [n, k].
    """
    if np.shape(quantized.codes) != (n, k):  # lists have shapes too, and are refused when they are read
        raise WeightsError(f"{name} has shape {np.shape(quantized.codes)}, expected {(n, k)}")
    return Stored(name, config, n, k, quantized.rows)


def open_matrix(
    arrays: Mapping[str, Any], config: MoEConfig, n: int, k: int, name: str, checkpoint_format: str | None = None
) -> Stored:
    """Recognise the format of one matrix [n, k] and check its arrays' names, types and shapes.

    Args:
        arrays: the part's name ("qweight", "weight_packed", ...; "" or "weight" for the plain array) to the array.
        config: what the matrix has to be: a format that says something else is refused.
        name: what the messages call the matrix.
        checkpoint_format: one of GPTQ_FORMATS; None takes "gptq", but also "gptq_v2" where all zero points are its symmetric one.

    Raises:
        WeightsError: an array is missing, superfluous, or of the wrong type or shape; the message names the field of the
            configuration that is at odds, with both values.
    """
    if checkpoint_format not in (None, *GPTQ_FORMATS):
        raise WeightsError(f"checkpoint_format={checkpoint_format!r} must be one of {', '.join(GPTQ_FORMATS)}")
    parts = {part or "weight": as_host_array(array, f"{name}: {part or 'weight'}", WeightsError) for part, array in arrays.items()}
    return Stored(name, config, n, k, Parts(parts, config, n, k, name, checkpoint_format).reader())


def checkpoint_format_beside(path: Path) -> str | None:
    """The `checkpoint_format` that the config.json or quantize_config.json beside weights names, if any.

    Args:
        path: of the weights: a file, or the folder that holds them.
    """
    folder = path if path.is_dir() else path.parent
    for name in ("config.json", "quantize_config.json"):
        try:
            raw = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):  # absent, or not what these weights need to be read
            continue
        if isinstance(raw, dict):
            raw = raw.get("quantization_config", raw)
        if isinstance(raw, dict):
            said = raw.get("checkpoint_format", raw.get("format"))  # "format" since GPTQModel 5
            if isinstance(said, str) and said in GPTQ_FORMATS:
                return said
    return None
