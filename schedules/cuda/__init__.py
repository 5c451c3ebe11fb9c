"""Schedules for NVIDIA devices."""

from __future__ import annotations

from . import elementwise, few, hopper, losses, product, rewrites, route, tiling, topk

__all__ = ["elementwise", "few", "hopper", "losses", "product", "rewrites", "route", "tiling", "topk"]
