"""A dense shadow pass over a sampled share of (layer, decode step).

Coverage of query head h is Z_P / Z, the mass attended over the mass of all pages: with the two
log-sum-exps, exp(lse - lse_dense). It bounds the output error: |o - o_dense| <= 2 (1 - coverage)
max |v|.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sgl_psa_kernels.progressive_decode import progressive_decode

from sgl_psa.audit.counts import NUM_SUMS, AuditCounts, sums_of
from sgl_psa.row import CONSERVATIVE, COVERAGE, DENSE
from sgl_psa.stats import COVERAGE as CLAIMED

if TYPE_CHECKING:
    from sgl_psa.decode_step import DecodePlan


class AuditSample(NamedTuple):
    """One audited (layer, step).

    Attributes:
        coverage, claimed, error: float32 [B, Hq]: true coverage, the kernel's estimate of it (the
            same for the query heads of a KV head: of the worst of them; NaN where the policy reads
            no scores), relative output error.
        requested: float32 [B], NaN where no coverage was asked for.
        valid: bool [B], rows that decoded sparsely; the others hold no measurement.
    """

    coverage: torch.Tensor
    claimed: torch.Tensor
    error: torch.Tensor
    requested: torch.Tensor
    valid: torch.Tensor


def measure(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    columns: torch.Tensor,
    plan: DecodePlan,
    sm_scale: float,
    *,
    page_size: int,
    backend: str,
) -> AuditSample:
    """Attend all pages of the sparse rows and compare.

    Args:
        q, k_cache, v_cache, sm_scale: what :meth:`PSADecodeWrapper.run` was given.
        out, lse: what it returned, [B, Hq, D] and float32 [B, Hq].
        columns: the kernel's statistics, float32 [B, Hkv, 6].
        plan: the step.
    """
    batch, rows = plan.batch, plan.rows
    valid = (rows.mode != DENSE) & (batch.seq_lens > 0)
    zeros = torch.zeros_like(rows.threshold)
    # Rows that were dense anyway become padding rows, which cost nothing.
    dense_out, dense_lse, _ = progressive_decode(
        q,
        k_cache,
        v_cache,
        batch.page_table,
        torch.where(valid, batch.seq_lens, torch.zeros_like(batch.seq_lens)),
        None,
        torch.zeros_like(rows.mode),
        zeros,
        zeros,
        zeros,
        page_size=page_size,
        sm_scale=sm_scale,
        sink_pages=0,
        recent_pages=1,
        group_pages=1,
        backend=backend,
    )
    asked = (rows.mode == COVERAGE) | (rows.mode == CONSERVATIVE)
    nan = torch.full_like(rows.threshold, float("nan"))
    difference = (out.float() - dense_out.float()).norm(dim=-1)
    group = q.shape[1] // columns.shape[1]
    return AuditSample(
        torch.exp(lse - dense_lse),
        columns[..., CLAIMED].repeat_interleave(group, 1),
        difference / dense_out.float().norm(dim=-1),
        torch.where(asked, torch.sigmoid(-rows.threshold), nan),
        valid,
    )


class Auditor:
    """Audits a deterministic sample of the (layer, step) that it is shown.

    The choice depends only on the seed, the layer and how often the layer was seen, so the ranks
    of a tensor-parallel server choose the same ones.

    Attributes:
        audited: number of (layer, step) audited so far.
    """

    def __init__(
        self, num_layers: int, rate: float, *, page_size: int, backend: str, seed: int = 0
    ) -> None:
        """
        Args:
            rate: share of (layer, step) to audit, 0 to 1.
        """
        self.rate = rate
        self.page_size = page_size
        self.backend = backend
        self.seed = seed
        self.audited = 0
        self._seen = [0] * num_layers
        self._sums = torch.zeros(num_layers, NUM_SUMS, dtype=torch.float64)

    def observe(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        columns: torch.Tensor,
        plan: DecodePlan,
        sm_scale: float,
    ) -> None:
        """Show the auditor one layer of one step; arguments as of :func:`measure`.

        Steps without sparse rows are not seen.
        """
        if not plan.sparse_rows:
            return
        self._seen[layer] += 1
        if not sampled(self.seed, layer, self._seen[layer], self.rate):
            return
        sample = measure(
            q,
            k_cache,
            v_cache,
            out,
            lse,
            columns,
            plan,
            sm_scale,
            page_size=self.page_size,
            backend=self.backend,
        )
        self.audited += 1
        self.record(layer, sample)

    def record(self, layer: int, sample: AuditSample) -> None:
        """Account one sample; stays on the device of the sample."""
        self._sums = self._sums.to(sample.coverage.device)
        self._sums[layer] += sums_of(*sample)

    @property
    def layers(self) -> list[AuditCounts]:
        """Counts of each layer."""
        return [AuditCounts.from_sums(sums) for sums in self._sums.tolist()]

    def total(self) -> AuditCounts:
        """Counts over all layers."""
        return AuditCounts.from_sums(self._sums.sum(0).tolist())

    def as_dict(self) -> dict[str, Any]:
        """``audit`` in the JSON of ``GET /psa/stats``."""
        return {
            "rate": self.rate,
            "audited": self.audited,
            **self.total().as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
        }


def sampled(seed: int, layer: int, visit: int, rate: float) -> bool:
    """Whether this visit of this layer belongs to the sample: a hash below ``rate``."""
    return _mix(_mix(_mix(seed) ^ layer) ^ visit) < rate * 2.0**64


def _mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)
