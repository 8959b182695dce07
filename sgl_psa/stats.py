"""What was read: counters of the decode loop, kept by layer and by row of the batch.

All counts are per KV head and summed over KV heads; bytes include the summaries and sketches that
were read to choose pages, so a fraction is of everything that dense attention would have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from sgl_psa.audit import Auditor
    from sgl_psa.prediction import Predictor

#: Columns of the kernels' per (row, KV head) statistics.
PAGES, TOKENS, SCORED, ROUNDS, COVERAGE, STALE = range(6)
NUM_COLUMNS = 6


class ByteCost(NamedTuple):
    """Bytes that one KV head reads: per attended token (K and V), and per scored page."""

    token: int
    scored_page: int


@dataclass
class ReadCounts:
    """Sums over (row, KV head) of decode steps; ``visits`` is the number of terms.

    ``coverage`` sums over the ``estimates`` terms of which it is known: a policy that reads no
    scores has no estimate of what it left out. ``stopped`` is the number of terms whose reading a
    stop rule ended, ``one_round_terms`` how many of these took one round at most.
    """

    visits: int = 0
    pages_attended: int = 0
    pages_total: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    rounds: float = 0.0
    coverage: float = 0.0
    stale_pages: int = 0
    estimates: int = 0
    stopped: int = 0
    one_round_terms: int = 0

    @property
    def mean_coverage(self) -> float | None:
        """Mean estimated coverage, ``None`` if none is known."""
        return self.coverage / self.estimates if self.estimates else None

    @property
    def one_round(self) -> float | None:
        """Share of ``stopped`` that took one round at most, ``None`` if there are none."""
        return self.one_round_terms / self.stopped if self.stopped else None

    def add(self, other: ReadCounts) -> None:
        """Add ``other`` to this, in place."""
        for name in _COLUMNS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """Counts with the fractions that follow from them; means are over (row, KV head).

        ``mean_coverage`` is ``None`` if no estimate is known, and 1 if nothing ran; ``one_round``
        is ``None`` where no stop rule ended reading.
        """
        return {
            "visits": self.visits,
            "pages_attended": self.pages_attended,
            "pages_total": self.pages_total,
            "bytes_read": self.bytes_read,
            "bytes_dense": self.bytes_dense,
            "pages_fraction": _ratio(self.pages_attended, self.pages_total),
            "bytes_fraction": _ratio(self.bytes_read, self.bytes_dense),
            "mean_rounds": _ratio(self.rounds, self.visits, empty=0.0),
            "mean_coverage": self.mean_coverage if self.visits else 1.0,
            "stale_pages": self.stale_pages,
            "estimates": self.estimates,
            "stopped": self.stopped,
            "one_round_terms": self.one_round_terms,
            "one_round": self.one_round,
        }


_COLUMNS = tuple(f.name for f in fields(ReadCounts))


def _ratio(part: float, whole: float, empty: float = 1.0) -> float:
    return part / whole if whole else empty


@dataclass
class StepStats:
    """Statistics of one decode step.

    Attributes:
        table: float64 [L, B, 11], summed over KV heads; columns are the fields of ReadCounts.
        sparse_rows: rows of the batch that did not take the dense pass; a number on the device of
            steps in a CUDA graph.
    """

    table: torch.Tensor
    sparse_rows: int | torch.Tensor

    def layer(self, index: int) -> ReadCounts:
        """Counts of one layer, all rows."""
        return _counts(self.table[index].sum(0).tolist())

    def row(self, index: int) -> ReadCounts:
        """Counts of one row, all layers."""
        return _counts(self.table[:, index].sum(0).tolist())


def _counts(sums: list[float]) -> ReadCounts:
    whole = (name not in ("rounds", "coverage") for name in _COLUMNS)
    values = (int(x) if count else x for x, count in zip(sums, whole, strict=True))
    return ReadCounts(*values)  # type: ignore[arg-type]


def step_stats(
    columns: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse_rows: int | torch.Tensor,
    page_size: int,
    cost: ByteCost,
    summary_bytes: torch.Tensor | None = None,
    stops: torch.Tensor | None = None,
) -> StepStats:
    """Turn the kernels' statistics into counts.

    Args:
        columns: float32 [L, B, Hkv, NUM_COLUMNS]; a coverage of NaN is not known.
        seq_lens: int32 [B]; rows of length 0 are padding and count nothing.
        summary_bytes: float32 [L, B, Hkv], bytes read of what is kept of the pages, to score them
            and otherwise; ``None``: none.
        stops: bool [B], rows whose reading a stop rule ended; ``None``: no row.
    """
    if stops is None:
        stops = torch.zeros_like(seq_lens, dtype=torch.bool)
    shape = (*columns.shape[:2], len(_COLUMNS))
    table = torch.empty(shape, dtype=torch.float64, device=columns.device)
    numbers = (columns, seq_lens, summary_bytes)
    if table.is_cpu:
        wide = [None if x is None else x.numpy().astype(np.float64) for x in numbers]
        _fill(np, table.numpy(), [*wide, stops.numpy()], page_size, cost)
    else:
        wide = [None if x is None else x.double() for x in numbers]
        _fill(torch, table, [*wide, stops], page_size, cost)
    return StepStats(table, sparse_rows)


def _fill(xp: Any, table: Any, given: Sequence[Any], page_size: int, cost: ByteCost) -> None:
    """Write the table of :class:`StepStats`, with ``xp`` numpy or torch: a call of torch takes
    several times as long, which counts for tensors as small as on CPUs."""
    columns, lens, summary_bytes, stops = given
    heads = columns.shape[2]
    known = columns == columns
    sums = xp.where(known, columns, 0.0).sum(2)
    table[..., 0] = heads
    table[..., 1] = sums[..., PAGES]
    table[..., 2] = heads * xp.ceil(lens / page_size)
    read = columns[..., TOKENS] * cost.token
    table[..., 3] = (read if summary_bytes is None else read + summary_bytes).sum(2)
    table[..., 4] = heads * cost.token * lens
    table[..., 5] = sums[..., ROUNDS]
    table[..., 6] = sums[..., COVERAGE]
    table[..., 7] = sums[..., STALE]
    table[..., 8] = known[..., COVERAGE].sum(2)
    table[..., 9] = heads * stops
    table[..., 10] = stops * (columns[..., ROUNDS] <= 1).sum(2)
    table *= (lens > 0)[:, None]


class PSAStats:
    """Totals of a server (one tensor-parallel rank) since start; kept where the steps' are.

    Attributes:
        audit: the auditor whose totals belong to these, if there is one.
        predictor: of the budgets, if there is one.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.decode_steps = 0
        self._sparse_rows: int | torch.Tensor = 0
        self.audit: Auditor | None = None
        self.predictor: Predictor | None = None
        self._table = torch.zeros(num_layers, len(_COLUMNS), dtype=torch.float64)

    def add(self, step: StepStats) -> None:
        """Account one decode step."""
        self.decode_steps += 1
        self._sparse_rows = self._sparse_rows + step.sparse_rows
        if step.table.is_cpu and self._table.is_cpu:
            self._table.numpy()[:] += step.table.numpy().sum(1)
            return
        self._table = self._table.to(step.table.device)
        self._table += step.table.sum(1)

    @property
    def sparse_rows(self) -> int:
        """Rows that did not take the dense pass, over all steps."""
        return int(self._sparse_rows)

    @property
    def layers(self) -> list[ReadCounts]:
        """Counts of each layer."""
        return [_counts(row) for row in self._table.tolist()]

    def total(self) -> ReadCounts:
        """Counts over all layers."""
        return _counts(self._table.sum(0).tolist())

    def as_dict(self) -> dict[str, Any]:
        """The JSON of ``GET /psa/stats``."""
        return {
            "active": self.sparse_rows > 0,
            "decode_steps": self.decode_steps,
            "sparse_rows": self.sparse_rows,
            **self.total().as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "inherited": None if self.predictor is None else self.predictor.inherited,
            "audit": None if self.audit is None else self.audit.as_dict(),
        }
