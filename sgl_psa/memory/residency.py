"""Which layer holds how many frames: victims for each step, working sets, and what became of it."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from sgl_psa_kernels.page_tier import PageTier

from sgl_psa.memory.placements import Placement

#: Decode steps whose selections make a working set: the overlap with the next selection hardly
#: grows with more of them (SparseServe, arXiv 2509.24626).
WORKING_SET_STEPS = 12
#: Fewest victims that are named; steps in which more were needed raise their number.
_LEAST_VICTIMS = 256
_MOST_SAMPLES = 256
_FIRST_INTERVAL = 4


class Sample(NamedTuple):
    """Frames of each layer when a step began."""

    step: int
    frames: tuple[int, ...]


class Residency:
    """Runs a placement on a tier; ``begin_step`` once before the layers of a decode step.

    Reads the tier's tables, which are on the CPU whatever device attends, and waits for nothing: of
    a CUDA device they show a step that is over.

    Attributes:
        samples: of the whole run; every second one is dropped when they become too many.
        order_ns: time spent on ordering victims; ``orders`` how often.
    """

    def __init__(self, tier: PageTier, placement: Placement) -> None:
        self.tier = tier
        self.placement = placement
        self.samples: list[Sample] = []
        self.order_ns = 0
        self.orders = 0
        self._interval = _FIRST_INTERVAL
        self._named = False
        self._step = 0
        self._filled = 0
        self._recent: deque[int] = deque([0], maxlen=WORKING_SET_STEPS)
        if placement.quota < tier.shape.num_frames:
            tier.set_quota(placement.quota)

    def begin_step(self, step: int) -> None:
        """Name the frames that may be taken in ``step``, if they may run short."""
        self._step = step
        tables = self.tier.tables
        self.placement.age(tables, step)
        filled = int(tables.came.max())
        self._recent.append(filled - self._filled)
        self._filled = filled
        if step % self._interval == 0:
            self._sample(step)
        # Several times what any of the last steps needed: those that the step itself attends do not
        # leave, and a layer may find most of them its own.
        count = min(max(4 * max(self._recent), _LEAST_VICTIMS), self.tier.shape.num_frames)
        if self._room() >= count:
            if self._named:
                self.tier.set_victims(torch.empty(1, 0, dtype=torch.int32))
                self._named = False
            return
        start = time.perf_counter_ns()
        self.tier.set_victims(self.placement.victims(tables, count))
        self.order_ns += time.perf_counter_ns() - start
        self.orders += 1
        self._named = True

    def _room(self) -> int:
        """Frames that a layer can fill before one has to be taken."""
        tables, quota = self.tier.tables, self.placement.quota
        free = int((tables.owner == -1).sum())
        if quota < self.tier.shape.num_frames:
            free = min(free, quota - int(self.frames_by_layer().max()))
        return free

    def frames_by_layer(self) -> np.ndarray:
        """Frames that each layer holds now, int64 [L]."""
        shape = self.tier.shape
        owner = self.tier.tables.owner.numpy()
        return np.bincount(owner[owner >= 0] // shape.num_pages, minlength=shape.num_layers)

    def _sample(self, step: int) -> None:
        self.samples.append(Sample(step, tuple(self.frames_by_layer().tolist())))
        if len(self.samples) >= _MOST_SAMPLES:
            self.samples = self.samples[1::2]
            self._interval *= 2

    def working_set(self, pages: torch.Tensor) -> int:
        """Frames that logical pages (int64 [n]) need: those of the pages that the last 12 steps
        attended, over all layers; at least the open page's, one a layer. Pages on a device are
        waited for."""
        stamp = self.tier.tables.stamp[:, pages.cpu()]
        return max(int(self._lately(stamp).sum()), self.tier.shape.num_layers)

    def working_set_by_layer(self) -> list[int]:
        """Pages of each layer that the last 12 steps attended, of all requests; released ones do
        not count."""
        return self._lately(self.tier.tables.stamp).sum(1).tolist()

    def _lately(self, stamp: torch.Tensor) -> torch.Tensor:
        # Stamp 0 is never; the first steps have no 12 before them.
        return stamp > max(self._step - WORKING_SET_STEPS, 0)
