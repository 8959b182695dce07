"""Residual statistics: what the estimates of a request's pages were lately off by.

A residual is exact minus estimated log mass of a page that was attended. Per (request, layer, query
head) their count, sum and sum of squares are kept; every step that has residuals first scales the
old sums by ``DECAY``. mean + c * std of them is a correction of the estimates that is known before
a step has read anything, where that of its own groups is not; it is the lower bound of both.
"""

from __future__ import annotations

import torch

#: Weight of a step's residuals after the next step.
DECAY = 0.9
#: Least standard deviations in a correction from the statistics, found by ``sgl_psa.audit``.
KEPT_STD = 2.0
#: Columns of the sums.
COUNT, SUM, SQUARE = range(3)


class ResidualState:
    """Statistics of every request slot; all operations stay on the device.

    Attributes:
        sums: float32 [slots, L, Hq, 3], by ``COUNT``, ``SUM``, ``SQUARE``; ``None`` before
            :meth:`reserve`.
    """

    def __init__(self, num_layers: int, *, device: torch.device | str = "cpu") -> None:
        self.num_layers = num_layers
        self.device = device
        self.sums: torch.Tensor | None = None

    def reserve(self, num_slots: int, num_qo_heads: int) -> torch.Tensor:
        """``sums`` with room for ``num_slots`` slots; those that exist keep their state."""
        if self.sums is None:
            shape = (0, self.num_layers, num_qo_heads, 3)
            self.sums = torch.zeros(shape, device=self.device)
        more = num_slots - len(self.sums)
        if more > 0:
            blank = self.sums.new_zeros(more, *self.sums.shape[1:])
            self.sums = torch.cat([self.sums, blank])
        return self.sums

    def start(self, num_slots: int, slots: torch.Tensor, fresh: torch.Tensor) -> None:
        """Forget the requests in ``slots`` int64 [B] of ``num_slots``, where ``fresh`` bool [B]."""
        if self.sums is not None:
            sums = self.reserve(num_slots, self.sums.shape[2])
            sums[slots] = sums[slots].masked_fill(fresh[:, None, None, None], 0.0)

    def snapshot(self, slot: int) -> torch.Tensor | None:
        """The state of one request, float32 [L, Hq, 3], if there is any."""
        return None if self.sums is None else self.sums[slot].clone()

    def inherit(self, slot: int, snapshot: torch.Tensor | None) -> None:
        """Give the request in ``slot`` the state of the prefix that it shares."""
        if snapshot is None:
            if self.sums is not None and slot < len(self.sums):
                self.sums[slot] = 0.0
            return
        self.reserve(slot + 1, snapshot.shape[1])[slot] = snapshot

    def known(self, slots: torch.Tensor) -> torch.Tensor:
        """Which of ``slots`` int64 [B] have residuals in any layer, bool [B]."""
        if self.sums is None:
            return torch.zeros_like(slots, dtype=torch.bool)
        return (self.sums[slots][..., COUNT] > 0).flatten(1).any(1)

    def corrections(
        self, slots: torch.Tensor, std: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Corrections to start a step with, in nats, float32 [L, B, Hq].

        Args:
            slots: int64 [B].
            std: float32 [B], standard deviations added to the mean.
            valid: bool [B]; the other rows, and heads without residuals yet, get 0.
        """
        assert self.sums is not None, "reserve first"
        sums = self.sums[slots].transpose(0, 1)
        count = sums[..., COUNT]
        mean = sums[..., SUM] / count
        spread = (sums[..., SQUARE] / count - mean.square()).clamp(min=0).sqrt()
        known = (count > 0) & valid[:, None]
        return torch.where(known, mean + std[:, None] * spread, 0.0).contiguous()

    def update(self, slots: torch.Tensor, sums: torch.Tensor, valid: torch.Tensor) -> None:
        """Learn from one step.

        Args:
            slots: int64 [B].
            sums: float32 [L, B, Hq, 3], of the step's residuals. Where there are none, the old
                sums keep their weight.
            valid: bool [B], rows to learn from, each in a slot of its own.
        """
        assert self.sums is not None, "reserve first"
        old, new = self.sums[slots], sums.transpose(0, 1)
        known = (new[..., COUNT] > 0) & valid[:, None, None]
        change = torch.where(known[..., None], new - (1 - DECAY) * old, 0.0)
        self.sums.index_add_(0, slots, change)
