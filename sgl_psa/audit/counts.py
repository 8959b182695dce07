"""Totals of audited rows, by layer. A row is one query head of one request at one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

#: A row is a violation when its coverage is more than this below the requested one.
TOLERANCE = 0.01
#: Lower edges of the histogram of achieved coverage; the last bin has no upper edge.
BIN_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass
class AuditCounts:
    """Sums over audited rows.

    Attributes:
        rows: number of rows.
        coverage: true share of the attention mass that was attended.
        claimed_rows: rows of which an estimate is known; the next sum is over these.
        claimed: estimated coverage that was reported for the row's KV head.
        error: |o - o_dense| / |o_dense|, Euclidean norms, outputs in the dtype of the queries.
        requested_rows: rows under a coverage rule; the two sums below are over these.
        requested: coverage asked for.
        violations: rows with coverage < requested - ``TOLERANCE``.
        histogram: rows by coverage, bins from ``BIN_EDGES``.
    """

    rows: int = 0
    coverage: float = 0.0
    claimed_rows: int = 0
    claimed: float = 0.0
    error: float = 0.0
    requested_rows: int = 0
    requested: float = 0.0
    violations: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * len(BIN_EDGES))

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> AuditCounts:
        """From the values of the fields in order, the bins last."""
        rows, coverage, known, claimed, error, requested_rows, requested, violations, *bins = sums
        return cls(
            int(rows),
            coverage,
            int(known),
            claimed,
            error,
            int(requested_rows),
            requested,
            int(violations),
            [int(n) for n in bins],
        )

    def add(self, other: AuditCounts) -> None:
        """Add ``other`` to this, in place."""
        for name in (f.name for f in fields(self) if f.name != "histogram"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Counts and means; means over no rows are ``None``."""
        return {
            "rows": self.rows,
            "mean_coverage": _mean(self.coverage, self.rows),
            "claimed_rows": self.claimed_rows,
            "mean_claimed": _mean(self.claimed, self.claimed_rows),
            "mean_error": _mean(self.error, self.rows),
            "requested_rows": self.requested_rows,
            "mean_requested": _mean(self.requested, self.requested_rows),
            "violations": self.violations,
            "violation_rate": _mean(self.violations, self.requested_rows),
            "histogram": dict(zip(map(str, BIN_EDGES), self.histogram, strict=True)),
        }

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> AuditCounts:
        """The counts behind :meth:`as_dict`, means turned back into sums."""
        rows, requested_rows = report["rows"], report["requested_rows"]
        return cls(
            rows,
            (report["mean_coverage"] or 0.0) * rows,
            report["claimed_rows"],
            (report["mean_claimed"] or 0.0) * report["claimed_rows"],
            (report["mean_error"] or 0.0) * rows,
            requested_rows,
            (report["mean_requested"] or 0.0) * requested_rows,
            report["violations"],
            list(report["histogram"].values()),
        )


#: Length of the list that :meth:`AuditCounts.from_sums` takes.
NUM_SUMS = len(fields(AuditCounts)) - 1 + len(BIN_EDGES)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def merge_reports(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The sum of several :meth:`Auditor.as_dict`, of ranks; ``None`` if nobody audits."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    layers = [AuditCounts() for _ in given[0]["layers"]]
    total = AuditCounts()
    for part in given:
        total.add(AuditCounts.from_dict(part))
        for layer, report in zip(layers, part["layers"], strict=True):
            layer.add(AuditCounts.from_dict(report))
    return {
        "rate": given[0]["rate"],
        "audited": sum(part["audited"] for part in given),
        **total.as_dict(),
        "layers": [layer.as_dict() for layer in layers],
    }


def sums_of(
    coverage: torch.Tensor,
    claimed: torch.Tensor,
    error: torch.Tensor,
    requested: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """The sums of one audited step, float64 [NUM_SUMS], without leaving the device.

    Args:
        coverage, claimed, error: float [B, Hq]; claimed is NaN where there is no estimate.
        requested: float [B], NaN where no coverage was asked for.
        valid: bool [B], rows that count.
    """
    one = valid[:, None].expand_as(coverage)
    known = one & ~torch.isnan(claimed)
    asked = one & ~torch.isnan(requested)[:, None]
    short = asked & (coverage < requested[:, None] - TOLERANCE)
    edges = torch.tensor(BIN_EDGES[1:], dtype=torch.float64, device=coverage.device)
    place = torch.bucketize(coverage.double().nan_to_num(0.0), edges, right=True)
    bins = torch.zeros(len(BIN_EDGES), dtype=torch.float64, device=coverage.device)
    bins.scatter_add_(0, place.flatten(), one.flatten().double())
    sums = [
        one.sum(),
        coverage.double().where(one, 0.0).sum(),
        known.sum(),
        claimed.double().where(known, 0.0).sum(),
        error.double().where(one, 0.0).sum(),
        asked.sum(),
        requested.double()[:, None].where(asked, 0.0).sum(),
        short.sum(),
    ]
    return torch.cat([torch.stack([x.double() for x in sums]), bins])
