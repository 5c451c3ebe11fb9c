"""Schedules for NVIDIA devices."""

from __future__ import annotations

from . import elementwise, few, losses, product, rewrites, tiling, topk

__all__ = ["elementwise", "few", "losses", "product", "rewrites", "tiling", "topk"]
