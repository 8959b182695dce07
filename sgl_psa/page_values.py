"""What is kept of the values of each page, and its part in a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sgl_psa.selector import estimated_coverage
from sgl_psa.stats import COVERAGE
from sgl_psa.value_means import ValueMeans
from sgl_psa.value_norms import PAGE_BYTES, ValueNorms

if TYPE_CHECKING:
    from sgl_psa.decode_step import DecodePlan


class PageValues:
    """Means for tail compensation and norms for stop rule ``change``; either may be missing."""

    def __init__(self, means: ValueMeans | None, norms: ValueNorms | None) -> None:
        self.means = means
        self.norms = norms

    @property
    def states(self) -> list[ValueMeans | ValueNorms]:
        """Those that are kept."""
        return [state for state in (self.means, self.norms) if state is not None]

    def size_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(state.size_bytes() for state in self.states)

    def take_part(self, plan: DecodePlan) -> bool:
        """Whether the step has rows that :meth:`complete` does something for."""
        return plan.weighted_rows > 0 or (self.means is not None and plan.scored_rows > 0)

    def weigh(
        self, layer: int, log_mass: torch.Tensor, plan: DecodePlan, watermark: torch.Tensor
    ) -> torch.Tensor:
        """A copy of ``log_mass`` float32 [B, Hq, max_pages], plus the log weights of the pages in
        rows of stop rule ``change``.

        Args:
            watermark: int32 [num_pages], the scorer's, of the layer.
        """
        if not plan.weighted_rows or self.norms is None:
            return log_mass.clone()
        exists, tokens = self._pages(plan)
        table = torch.where(exists, plan.batch.page_table.long(), 0)
        fresh = exists & (watermark[table] >= tokens) & plan.rows.weighted[:, None]
        weights = self.norms.log_weights(layer, plan.batch, fresh)
        return log_mass + weights.repeat_interleave(log_mass.shape[1] // weights.shape[1], 1)

    def complete(
        self,
        layer: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        estimates: torch.Tensor,
        attended: torch.Tensor,
        columns: torch.Tensor,
        plan: DecodePlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """After attention: compensate the scored rows, and put the statistics of weighted ones
        right, whose loop saw weighted estimates.

        Args:
            out, lse: of the pages attended, [B, Hq, D] and float32 [B, Hq].
            estimates: float32 [B, Hq, max_pages], the scorer's, not weighted.
            attended: uint8 [B, Hkv, max_pages].
            columns: float32 [B, Hkv, NUM_COLUMNS], written.

        Returns:
            The output, and the bytes of means and norms read, float32 [B, Hkv].
        """
        exists, _ = self._pages(plan)
        left = exists[:, None] & (attended == 0)
        read = torch.zeros(left.shape[:2], device=left.device)
        if plan.weighted_rows:
            weighted = (plan.rows.weighted & (plan.batch.active != 0))[:, None]
            heads = columns.shape[1]
            true_coverage = estimated_coverage(
                lse.unflatten(1, (heads, -1)), estimates.unflatten(1, (heads, -1)), left
            )
            columns[..., COVERAGE] = torch.where(weighted, true_coverage, columns[..., COVERAGE])
            read += weighted * exists.sum(1, keepdim=True) * PAGE_BYTES
        if self.means is None:
            return out, read
        out, of_means = self.means.compensate(layer, out, lse, estimates, left, plan.batch)
        return out, read + of_means

    def _pages(self, plan: DecodePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of the scored rows, bool [B, max_pages], and the tokens of every page."""
        size = self.states[0].shape.page_size
        place = torch.arange(plan.batch.page_table.shape[1], device=plan.batch.seq_lens.device)
        tokens = (plan.batch.seq_lens[:, None] - place * size).clamp(0, size)
        return (tokens > 0) & (plan.batch.active[:, None] != 0), tokens
