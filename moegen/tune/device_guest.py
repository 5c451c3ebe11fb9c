"""A guest on a server that measures on its CUDA device: weights are packed here, and wait in the server's memory.

No process of a session opens the device but those that measure, each of which copies the packed weights to it: what crashes there,
hangs or leaves the device in an error costs one measurement.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..packing import Packer
from .guest import Guest

Array = npt.NDArray[Any]

_BYTES_PER_SECOND = 0.5e9  # at the least, from memory that is not pinned to a device


class DeviceGuest(Guest):
    """As `Guest`; one copy of the weights is in the server's memory, and a child makes all others on the device."""

    def room(self, packed_bytes: int, copies: int) -> list[Any]:
        """As `Guest.room`: the same memory once for each copy."""
        self._loading_seconds = copies * packed_bytes / _BYTES_PER_SECOND
        return [self.host.empty((packed_bytes,), "uint8")] * copies

    def packer(self) -> Packer:
        """As `Guest.packer`."""
        return LayoutPacker(self)

    def patience(self, limit: float) -> float:
        """As `Guest.patience`."""
        return limit + self._loading_seconds


class LayoutPacker(Packer):
    """Sends weights to where they lie in the packed blob: padded with zeros, and otherwise as they are (`moegen.cuda_geometry`).

    Args:
        guest: whose blob it is.
    """

    def __init__(self, guest: DeviceGuest) -> None:
        super().__init__(guest.default.manifest, self._place, 0, guest.blobs[0])
        self.host = guest.host
        self.placed = guest.default.manifest["segments"]

    def _place(self, blob: Any, index: int, expert: int, first: Array, second: Array | None, pool: int) -> None:
        """What the library's `moe_pack` does on a device."""
        segment = self.placed[index]
        _, parts, *padded = segment["shape"]
        for part, matrix in enumerate((first, second)):
            if matrix is not None:
                whole = _padded(matrix, tuple(padded))
                at = int(segment["offset_bytes"]) + (expert * parts + part) * whole.nbytes
                self.host.write(whole, blob, at, "packing weights")

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        self.host.write(values, self.blob, int(self.segments[name][1]["offset_bytes"]), "packing weights")


def _padded(matrix: Array, shape: tuple[int, ...]) -> Array:
    if matrix.shape == shape:
        return matrix
    whole = np.zeros(shape, matrix.dtype)
    whole[tuple(slice(extent) for extent in matrix.shape)] = matrix
    return whole
