"""Tuning: searching, measuring and recording the choices of a layer. Nothing that builds or runs layers needs it."""
