"""Rendering for CUDA: a geometry in, the text of the tensor-expression module out."""

from __future__ import annotations

import pprint
import re
from collections.abc import Sequence

from .. import emission
from ..cuda_geometry import CudaGeometry
from ..target import Target
from ..version import __version__


def te_source(geometry: CudaGeometry, target: Target, rows: Sequence[int]) -> str:
    """The readable, specialised Python module of TVM tensor-expression definitions.

    Args:
        rows: of the row blocks that there are tile kernels for.
    """
    config = geometry.config
    text = (
        emission.environment()
        .get_template("cuda/module.py.jinja")
        .render(
            title=emission.title(config),
            version=__version__,
            target=str(target),
            config=config,
            tiling={"rows": list(rows)},
            config_literal=pprint.pformat(config.to_dict(), sort_dicts=False, width=120),
            tiling_literal=repr({"rows": list(rows)}),
            functions=emission.functions(config),
            gated_call=emission.GATED_CALLS.get(config.activation, ("", ""))[1],
            ffns=geometry.ffns,
            prefixes=[prefix for prefix, _, _ in geometry.ffns],
            router=geometry.router,
            terms_type=geometry.terms_type,
            many_threads=True,
        )
    )
    return re.sub(r"\n{2,}(?=def )", "\n\n\n", text)
