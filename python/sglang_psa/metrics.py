"""Prometheus series ``sglang:psa_*`` of the scheduler process, with SGLang's own labels.

SGLang runs Prometheus in multiprocess mode: a series made in any of its processes appears at
``/metrics`` of the server. Like SGLang's own, ours come from tensor-parallel rank 0 only, unless
``--enable-metrics-for-all-schedulers`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_psa.audit import AuditCounts, Auditor
from sgl_psa.stats import ReadCounts, StepStats
from sglang_psa import compat, state
from sglang_psa.hooks import Hook, Kind
from sglang_psa.server_args import psa_config, uses_psa
from sglang_psa.tiered_metrics import TierMetrics

PREFIX = "sglang:psa_"
#: Series -> what it counts; ``prometheus_client`` appends ``_total``.
COUNTERS = {
    "decode_steps": "Decode steps.",
    "sparse_rows": "Rows of decode batches that did not read everything: one a request and step.",
    "pages_attended": "Pages read by decode, summed over layers and KV heads.",
    "pages": "Pages that dense decode would have read.",
    "bytes_read": "Bytes read by decode, page summaries and sketches included.",
    "bytes_dense": "Bytes that dense decode would have read.",
    "stale_pages": "Pages read only because their summary was out of date.",
    "stopped": "Reads that a stop rule ended: one a request, step, layer and KV head.",
    "one_round": "Of these, reads that took one round of pages at most.",
}
#: Series of the coverage audit -> what it counts; 0 without ``--psa-audit-rate``.
#: Divide a sum by its rows, violations by ``audit_requested_rows``, for means and rates.
AUDIT_COUNTERS = {
    "audit_rows": "Audited rows: one a query head, layer, request and step.",
    "audit_coverage_sum": "True attention mass covered, summed over audited rows.",
    "audit_claimed_rows": "Audited rows of which an estimate of the coverage is known.",
    "audit_claimed_sum": "Estimated attention mass covered, summed over these.",
    "audit_error_sum": "Relative output error, summed over audited rows.",
    "audit_requested_rows": "Audited rows under a coverage rule.",
    "audit_violations": "Audited rows that cover over 0.01 less than requested.",
}
_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Series -> what it shows, and its buckets; one observation a decode step.
HISTOGRAMS = {
    "bytes_fraction": ("Bytes read by a decode step, relative to dense.", _FRACTIONS),
    "coverage": (
        "Estimated attention mass covered, mean of a decode step.",
        (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0),
    ),
    "rounds": (
        "Rounds of pages after the first, mean of a decode step.",
        (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128),
    ),
}


class StepMetrics:
    """The series of one scheduler."""

    def __init__(self, labels: Mapping[str, Any], registry: Any = None) -> None:
        """
        Args:
            labels: label names and values, the same as of SGLang's series.
            registry: a ``prometheus_client`` registry; ``None`` means the default one.
        """
        # SGLang sets PROMETHEUS_MULTIPROC_DIR at start-up; the client reads it when imported.
        from prometheus_client import REGISTRY, Counter, Histogram

        names, where = list(labels), registry or REGISTRY
        self._counters = {
            name: Counter(PREFIX + name, text, names, registry=where).labels(**labels)
            for name, text in {**COUNTERS, **AUDIT_COUNTERS}.items()
        }
        self._histograms = {
            name: Histogram(PREFIX + name, text, names, buckets=buckets, registry=where).labels(
                **labels
            )
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._audited = 0
        self._audit_seen = AuditCounts()

    def observe(self, step: StepStats) -> None:
        """Account one decode step."""
        sums = ReadCounts(*step.table.sum((0, 1)).tolist())
        if not sums.visits:
            return
        amounts = {
            "decode_steps": 1,
            "sparse_rows": int(step.sparse_rows),
            "pages_attended": sums.pages_attended,
            "pages": sums.pages_total,
            "bytes_read": sums.bytes_read,
            "bytes_dense": sums.bytes_dense,
            "stale_pages": sums.stale_pages,
            "stopped": sums.stopped,
            "one_round": sums.one_round_terms,
        }
        for name, amount in amounts.items():
            self._counters[name].inc(amount)
        self._histograms["bytes_fraction"].observe(sums.bytes_read / sums.bytes_dense)
        if sums.mean_coverage is not None:
            self._histograms["coverage"].observe(sums.mean_coverage)
        self._histograms["rounds"].observe(sums.rounds / sums.visits)

    def observe_audit(self, audit: Auditor) -> None:
        """Account what the auditor has measured since the last call."""
        if audit.audited == self._audited:
            return
        now, before = audit.total(), self._audit_seen
        amounts = {
            "audit_rows": now.rows - before.rows,
            "audit_coverage_sum": now.coverage - before.coverage,
            "audit_claimed_rows": now.claimed_rows - before.claimed_rows,
            "audit_claimed_sum": now.claimed - before.claimed,
            "audit_error_sum": now.error - before.error,
            "audit_requested_rows": now.requested_rows - before.requested_rows,
            "audit_violations": now.violations - before.violations,
        }
        for name, amount in amounts.items():
            self._counters[name].inc(amount)
        self._audited, self._audit_seen = audit.audited, now


_metrics: StepMetrics | None = None
_tier_metrics: TierMetrics | None = None


def observe(step: StepStats) -> None:
    """Account one decode step, if this process reports metrics."""
    if _metrics is not None:
        _metrics.observe(step)
        backend = state.get_backend()
        if backend is not None and backend.wrapper.audit is not None:
            _metrics.observe_audit(backend.wrapper.audit)
        if backend is not None and backend.pool.tier is not None and _tier_metrics is not None:
            _tier_metrics.observe(backend.pool.tier)


def start(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Make the series where SGLang makes its own."""
    global _metrics, _tier_metrics
    reporter = scheduler.metrics_reporter
    if uses_psa(scheduler.server_args) and reporter.current_scheduler_metrics_enabled:
        _metrics = StepMetrics(scheduler.metrics_collector.labels)
        if psa_config(scheduler.server_args).tiered:
            _tier_metrics = TierMetrics(scheduler.metrics_collector.labels)


HOOKS = (Hook("metrics", compat.INIT_METRICS_REPORTER, start, Kind.AFTER),)
