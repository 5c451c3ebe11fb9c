"""Numbers, times and tables as they are printed."""

from __future__ import annotations

import pytest

from moegen.display import NOTHING, duration, number, size, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, NOTHING), (0, "0.00"), (0.00012, "1.2e-04"), (0.5, "0.500"), (2.6, "2.60"), (100, "100"), (999.7, "1,000"),
        (12345.6, "12,346"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.5, "1.50 s"),
        (12.34, "12.3 s"),
        (0.0123, "12.3 ms"),
        (0.5, "500 ms"),
        (9.999e-3, "10.0 ms"),
        (4.2e-6, "4.20 µs"),
        (0, "0.00 µs"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_sizes() -> None:
    assert [size(count) for count in (0, 999, 1000, 12_885_000_000)] == ["0 B", "999 B", "1.0 kB", "12.9 GB"]


def test_tables() -> None:
    assert table(("name", "n"), [("a", 1), ("long name", 20)]) == "name       n\na          1\nlong name  20"
    assert table(("name", "n"), [("a", 1), ("long name", 20)], right=(1,)) == "name        n\na           1\nlong name  20"
