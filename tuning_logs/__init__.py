"""Curated tuning records."""
