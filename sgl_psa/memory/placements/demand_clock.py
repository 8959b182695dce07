"""A clock whose hand halves the demand of the frames that it passes and takes those without.

CLOCK (Corbato, 1968) gives a page that was used a second chance; generalised clocks (Smith, 1978)
give it as many as a counter says. Here the counter is the demand of attention: how many KV heads
attended the page in how many steps. Because it is halved and not lowered by one, a page outlives
others by the logarithm of its demand, and what was popular long ago is soon forgotten. All layers
share one clock, so a layer of flat attention, whose pages many heads select, keeps more frames.
"""

from __future__ import annotations

import numpy as np
import torch
from sgl_psa_kernels.page_tier import TierShape, TierTables

from sgl_psa.memory.placements.base import Placement, candidates, lowest, padded


class DemandClock(Placement):
    """The order in which the hand would take frames, found without moving it step by step.

    A frame of demand u falls in the round after bit_length(u) halvings; frames of one round in the
    order of their distance from the hand.
    """

    name = "demand"

    def __init__(self, shape: TierShape) -> None:
        super().__init__(shape)
        self.hand = 0
        self._order = np.empty(0, dtype=np.int64)

    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        frames = candidates(tables)
        # The exponent of a float32 is the bit length of the integer, 0 for 0.
        rounds = np.frexp(tables.uses.numpy()[frames].astype(np.float32))[1].astype(np.int64)
        key = rounds * self.shape.num_frames + (frames - self.hand) % self.shape.num_frames
        chosen = lowest(key, count)
        self._order = key[chosen]
        return torch.from_numpy(padded(frames[chosen], count))[None]

    def taken(self, tables: TierTables, count: int) -> None:
        """Move the hand past the last frame that was taken, and halve what it passed."""
        if not count or not len(self._order):
            return
        rounds, distance = divmod(
            int(self._order[min(count, len(self._order)) - 1]), self.shape.num_frames
        )
        uses = tables.uses.numpy()
        uses >>= min(rounds, 31)
        passed = distance + 1
        first = uses[self.hand : self.hand + passed]
        first >>= 1
        rest = uses[: max(self.hand + passed - self.shape.num_frames, 0)]
        rest >>= 1
        self.hand = (self.hand + passed) % self.shape.num_frames
        self._order = self._order[:0]
