"""Calls as CUDA graphs, and their time by CUDA events. What waits for the device cannot be captured and is timed as it is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
GRAPH, EAGER = "graph", "eager"
_KINDS = {0: "kernels", 1: "copies", 2: "fills"}  # CUgraphNodeType


class Replay:
    """Several calls in a row, the same outputs each time.

    Args:
        calls: each returns its output; they are called once before they are captured.

    Attributes:
        mode: `graph`, or `eager` for calls that wait for the device.
        outputs: of the last run, one for each call.
        launches: kernels, copies and fills of one call in the mean; None where they were not captured, or torch does not say.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # torch asks for a side stream before a capture
            for call in self.calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.outputs: list[Any] = []
        self.launches: dict[str, float] | None = None
        self.mode = EAGER if waits(self.calls[0]) else GRAPH
        if self.mode == GRAPH:
            self._capture()

    def _capture(self) -> None:
        self.graph = _kept_graph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call() for call in self.calls]
        if hasattr(self.graph, "raw_cuda_graph"):
            nodes = nodes_of(int(self.graph.raw_cuda_graph()))
            self.launches = {kind: count / len(self.calls) for kind, count in nodes.items()}
            self.graph.instantiate()

    def run(self) -> None:
        """All calls once, without waiting for them."""
        if self.mode == GRAPH:
            self.graph.replay()
        else:
            self.outputs = [call() for call in self.calls]

    def poison(self) -> None:
        """Fills the outputs with NaN: what is not written again shows."""
        for out in self.outputs:
            out.fill_(float("nan"))

    def seconds(self, repeats: int) -> float:
        """Of one call, the mean over so many runs of all."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            self.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats / len(self.calls)


def waits(call: Call) -> bool:
    """Whether a call waits for the device, as far as torch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def nodes_of(graph: int) -> dict[str, int]:
    """Kernels, copies and fills of a CUDA graph, by NVIDIA's driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t(0)
    _checked(driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    _checked(driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)))
    found = dict.fromkeys(_KINDS.values(), 0)
    for node in nodes:
        kind = ctypes.c_int(-1)
        _checked(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        if kind.value in _KINDS:
            found[_KINDS[kind.value]] += 1
    return found


def _kept_graph() -> Any:
    """A graph whose nodes can be looked at, where this torch has such ones."""
    return torch.cuda.CUDAGraph(keep_graph=True) if hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph") else torch.cuda.CUDAGraph()


def _checked(code: int) -> None:
    if code:
        raise RuntimeError(f"the driver does not say what a graph has: CUresult {code}")
