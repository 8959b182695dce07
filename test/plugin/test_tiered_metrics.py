"""Prometheus series of two tiers: amounts since the last time, and once a second."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from sglang_psa.tiered_metrics import COUNTERS, GAUGES, TierMetrics

LABELS = {"model_name": "m", "tp_rank": 0}
TEXT = {"model_name": "m", "tp_rank": "0"}


def snapshot(times: int) -> dict:
    amounts = {field: times * (i + 1) for i, (field, _, _) in enumerate(COUNTERS.values())}
    sizes = {field: 100 + times for field, _ in GAUGES.values()}
    return {**amounts, **sizes, "frames_by_layer": [times, 2 * times]}


def test_series_follow_the_snapshots_of_a_tier_once_a_second() -> None:
    registry = CollectorRegistry()
    metrics = TierMetrics(LABELS, registry)
    seen: list[int] = []
    tier = SimpleNamespace(snapshot=lambda: snapshot(seen[-1]))

    def value(name: str, **extra: str) -> float | None:
        return registry.get_sample_value(f"sglang:psa_memory_{name}", {**TEXT, **extra})

    for times, now in ((1, 10.0), (5, 10.5), (3, 11.0)):
        seen.append(times)
        metrics.observe(tier, now)
        counted = 3 if now == 11.0 else 1
        assert value("hits_total") == counted
        assert value("loads_total") == 2 * counted
        assert value("stall_seconds_total") == 7e-3 * counted
        assert value("frames_used") == 100 + counted
        assert value("frames", layer="1") == 2 * counted
