"""Counts for Prometheus, by its official client: as text, or as a collector for a registry of the user's.

prometheus_client.REGISTRY.register(Collector(load))
prometheus_client.start_http_server(9100)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ReportError

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ModuleNotFoundError as error:
    raise ReportError(
        f"Prometheus' format needs its client ({error.name} is not installed): pip install 'moegen[monitoring]'"
    ) from None

if TYPE_CHECKING:
    from .load import ExpertLoad

_COUNTERS = {
    "calls": ("moegen_calls", "Calls of the layer."),
    "tokens": ("moegen_tokens", "Tokens that came to the layer."),
    "dropped": ("moegen_dropped_choices", "Choices of experts that were over their capacity."),
    "invalid": ("moegen_invalid_choices", "Choices of experts that there are not."),
}
_GAUGES = {
    "entropy_bits": ("moegen_expert_load_entropy_bits", "Entropy of the choices over the experts."),
    "evenness": ("moegen_expert_load_evenness_ratio", "Entropy of the choices as a share of the largest possible."),
    "imbalance": ("moegen_expert_load_imbalance_ratio", "Choices of the busiest expert over the mean of all."),
    "variation": ("moegen_expert_load_variation_ratio", "Standard deviation of the experts' choices over their mean."),
    "gini": ("moegen_expert_load_gini_ratio", "Gini coefficient of the experts' choices."),
}


class Collector:
    """What a registry asks: counters of each layer and expert, and gauges of how uneven they are.

    Gauges have a label `over`: `total` since the start and, where there is a window, `window`. They are left out before the
    first choice.
    """

    def __init__(self, load: ExpertLoad) -> None:
        self.load = load

    def collect(self) -> Iterator[Any]:
        """The metrics of this moment."""
        layers = [(name, self.load.snapshot(name)) for name in self.load.layers]
        choices = CounterMetricFamily(
            "moegen_expert_choices", "Choices of the expert by the router, before capacity.", labels=("layer", "expert")
        )
        for name, counts in layers:
            for expert, count in enumerate(counts.counts.tolist()):
                choices.add_metric((name, str(expert)), count)
        yield choices
        for field, (metric, words) in _COUNTERS.items():
            counter = CounterMetricFamily(metric, words, labels=("layer",))
            for name, counts in layers:
                counter.add_metric((name,), getattr(counts, field))
            yield counter
        summaries = [(name, over, c.summary(name, over == "window")) for name, c in layers for over in _spans(c)]
        for field, (metric, words) in _GAUGES.items():
            gauge = GaugeMetricFamily(metric, words, labels=("layer", "over"))
            for name, over, summary in summaries:
                if (value := getattr(summary, field)) is not None:
                    gauge.add_metric((name, over), value)
            yield gauge
        dead = GaugeMetricFamily("moegen_dead_experts", "Experts that nothing has chosen since the start.", labels=("layer",))
        for name, counts in layers:
            dead.add_metric((name,), int((counts.counts == 0).sum()))
        yield dead


def _spans(counts: Any) -> tuple[str, ...]:
    return ("total",) if counts.window is None else ("total", "window")


def text(load: ExpertLoad) -> str:
    """The text exposition format (version 0.0.4)."""
    registry = CollectorRegistry()
    registry.register(Collector(load))
    return bytes(generate_latest(registry)).decode("utf-8")
