"""Prometheus series: names, labels and amounts."""

import dataclasses
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from sglang_psa.metrics import StepMetrics

from sgl_psa.audit import AuditCounts
from sgl_psa.stats import NUM_COLUMNS, ByteCost, step_stats

LABELS = {"model_name": "m", "tp_rank": 0}
TEXT = {"model_name": "m", "tp_rank": "0"}


def observed(registry: CollectorRegistry, name: str, **extra: str) -> Any:
    return registry.get_sample_value(f"sglang:psa_{name}", {**TEXT, **extra})


@pytest.fixture
def registry() -> CollectorRegistry:
    """One row of 10 pages, of which 4 are read; 2 layers, 1 head; then a step of padding only."""
    registry = CollectorRegistry()
    metrics = StepMetrics(LABELS, registry)
    columns = torch.zeros(2, 1, 1, NUM_COLUMNS)
    columns[0] = torch.tensor([4.0, 64.0, 0.0, 5.0, 0.875, 1.0])
    columns[1] = torch.tensor([4.0, 64.0, 0.0, 1.0, 0.875, 1.0])
    cost = ByteCost(token=8, scored_page=0)
    for length in (160, 0):
        lens = torch.tensor([length], dtype=torch.int32)
        stops = torch.tensor([True])
        metrics.observe(step_stats(columns, lens, 1, 16, cost, stops=stops))
    return registry


def test_counters(registry: CollectorRegistry) -> None:
    expected = {
        "decode_steps": 1,
        "sparse_rows": 1,
        "pages_attended": 8,
        "pages": 20,
        "bytes_read": 2 * 64 * 8,
        "bytes_dense": 2 * 160 * 8,
        "stale_pages": 2,
        "stopped": 2,
        "one_round": 1,
    }
    assert {name: observed(registry, f"{name}_total") for name in expected} == expected


def test_histograms(registry: CollectorRegistry) -> None:
    assert observed(registry, "bytes_fraction_count") == 1
    assert observed(registry, "bytes_fraction_sum") == pytest.approx(0.4)
    assert observed(registry, "coverage_sum") == pytest.approx(0.875)
    assert observed(registry, "rounds_sum") == pytest.approx(3.0)
    assert observed(registry, "rounds_bucket", le="2.0") == 0
    assert observed(registry, "rounds_bucket", le="4.0") == 1


class Audit:
    """An auditor with given totals."""

    def __init__(self) -> None:
        self.audited = 0
        self.counts = AuditCounts()

    def measure(self, counts: AuditCounts) -> None:
        self.audited += 1
        self.counts.add(counts)

    def total(self) -> AuditCounts:
        return dataclasses.replace(self.counts)


def test_audit_counters_grow_by_what_was_measured_since() -> None:
    registry = CollectorRegistry()
    metrics, audit = StepMetrics(LABELS, registry), Audit()
    assert observed(registry, "audit_rows_total") == 0
    audit.measure(AuditCounts(4, 3.5, 4, 3.75, 0.5, 2, 1.8, 1))
    metrics.observe_audit(audit)
    metrics.observe_audit(audit)
    audit.measure(AuditCounts(2, 1.5, 1, 1.0, 0.25))
    metrics.observe_audit(audit)
    expected = {
        "audit_rows": 6,
        "audit_coverage_sum": 5.0,
        "audit_claimed_rows": 5,
        "audit_claimed_sum": 4.75,
        "audit_error_sum": 0.75,
        "audit_requested_rows": 2,
        "audit_violations": 1,
    }
    assert {name: observed(registry, f"{name}_total") for name in expected} == expected
