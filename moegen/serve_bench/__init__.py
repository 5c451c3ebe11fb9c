"""Load tests: requests of mixed sizes, in an open or a closed loop, to a server or to a compiled layer.

    from moegen.bench import Subject
    from moegen.serve_bench import LayerTarget, Load, LoadRequest, ServerTarget, serve_bench
    asked = LoadRequest(Load(rate_per_s=20, requests=200))
    document = serve_bench(LayerTarget(Subject("mine", config)), asked)
    document = serve_bench(ServerTarget("http://127.0.0.1:8000/v1", "olmoe"), asked)

`moegen.serve_bench.results` says what the document holds. In an open loop requests come when they are due, and latencies count from
then: a target that falls behind is charged for the wait (no coordinated omission). In a closed loop a slow target is asked
less often, so that its latencies hide the wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrivals import Load, write_trace
    from .batching import Limits
    from .request import LayerTarget, LoadRequest, ServerTarget
    from .run import Watch, serve_bench
    from .summary import Objective

__all__ = [
    "LayerTarget",
    "Limits",
    "Load",
    "LoadRequest",
    "Objective",
    "ServerTarget",
    "Watch",
    "serve_bench",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    """Imported when first used: the command line imports this package whatever it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import arrivals, batching, request, run, summary

    return next(getattr(module, name) for module in (arrivals, batching, request, run, summary) if hasattr(module, name))
