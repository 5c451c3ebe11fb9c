"""Which experts work: running counts per expert, and what follows from them.

    load = ExpertLoad()
    layer = load.watch(moegen.load(path).bind(weights), "3")  # calls of `layer` count; or load.update(routing, layer="3")
    print(load.summary("3"))
    load.save("load.json")  # `moegen report load.json --out report` draws it
    print(load.prometheus())  # needs the `[monitoring]` extra

Nothing here is imported, and nothing costs anything, unless a layer is watched.
"""

from __future__ import annotations

from .load import ExpertLoad
from .measures import Summary

__all__ = ["ExpertLoad", "Summary"]
