"""Benchmarks of layers beside what people would use instead.

    from moegen.bench import Effort, Request, Subject, bench
    document = bench([Subject("mine", config)], Request(tokens=(1, 64), effort=Effort(rounds=5)))

`moegen.bench.results` says what the document holds, and reads and writes it. Nothing here imports the compiler before a layer
has to be built, and a contender's library is imported in that contender's process only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .request import Effort, Request, Subject, preset_subject
    from .run import Watch, bench

__all__ = ["Effort", "Request", "Subject", "Watch", "bench", "preset_subject"]


def __getattr__(name: str) -> Any:
    """Imported when first used: the command line imports this package whatever it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import request, run

    return getattr(run if name in ("Watch", "bench") else request, name)
