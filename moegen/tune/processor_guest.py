"""A guest on a server that measures on its processors: weights are packed there, with the default's own `moe_pack`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..packing import Packer
from .guest import DEFAULT, Guest
from .host import EXCHANGE_SECONDS

Array = npt.NDArray[Any]


class ProcessorGuest(Guest):
    """As `Guest`; copies of the weights lie in the server's memory, on huge pages."""

    def room(self, packed_bytes: int, copies: int) -> list[Any]:
        """As `Guest.room`."""
        self._pack = self.line.session.load_module(DEFAULT)["moe_pack"]
        blobs = [self.host.empty((packed_bytes,), "uint8") for _ in range(copies)]
        for blob in blobs:
            self.host.call("huge", blob)
        return blobs

    def packer(self) -> Packer:
        """As `Guest.packer`."""
        return _Packer(self)

    def packed(self) -> None:
        """As `Guest.packed`."""
        with self.line.within(EXCHANGE_SECONDS, "copying the weights"):
            for blob in self.blobs[1:]:
                self.host.call("copy", self.blobs[0], blob, 0)

    def pack(self, blob: Any, segment: int, expert: int, first: Array, second: Array | None, pool: int) -> None:
        """The library's `moe_pack`, of arrays that are here."""
        put = self.host.put
        with self.line.within(EXCHANGE_SECONDS, "packing weights"):
            self._pack(blob, segment, expert, put(first), None if second is None else put(second), pool)


class _Packer(Packer):
    """Packs into a guest's first copy of the weights."""

    def __init__(self, guest: ProcessorGuest) -> None:
        super().__init__(guest.default.manifest, guest.pack, 0, guest.blobs[0])
        self.guest = guest

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        self.guest.host.write(values, self.blob, int(self.segments[name][1]["offset_bytes"]), "packing weights")
