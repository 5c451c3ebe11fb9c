"""How the projections of experts may be stored, and what rows they are multiplied with: values of the configuration's fields."""

from __future__ import annotations

WEIGHT_DTYPES = ("same", "int8", "int4", "mxfp4")
WEIGHT_GROUPS = (0, 32, 64, 128)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
ACTIVATION_DTYPES = ("same", "int8")
