"""Two levels of rotated sketches: one bit a key element everywhere, more bits where it may matter.

The first level scores every page from its 1-bit sketch. The second reads ``sketch_bits`` bits a key
element of the candidate pages only, at most ``candidate_pages`` of a KV head whatever the context.
All other pages keep their first estimate, which is calibrated, so that a page that was passed over
can still be attended. Page means, moments and boxes do not serve as a first level: even among 32
pages of their choice single keys that hold most of the mass are missing
(``benchmark/scorer_recall.py`` measures it).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels.candidate_pages import candidate_pages

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer
from sgl_psa.scorers.rotated_sketch import RotatedSketchScorer

_FIRST_BITS = 1


class TwoLevelScorer(Scorer):
    """State: that of two rotated sketches, which share one watermark and one rotation."""

    name = "two_level"

    def __init__(self, shape: CacheShape, backend: str, bits: int, candidate_pages: int) -> None:
        """
        Args:
            bits: of the second level, more than 1.
            candidate_pages: most pages of a row and KV head that the second level reads.
        """
        super().__init__(shape, backend)
        self.candidate_pages = candidate_pages
        self.first = RotatedSketchScorer(shape, backend, _FIRST_BITS)
        self.second = RotatedSketchScorer(shape, backend, bits)
        self.first.watermark = self.second.watermark = self.watermark
        self._read: dict[int, torch.Tensor] = {}
        self._batch: PageBatch | None = None
        self._first_bytes = torch.zeros(0)

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> TwoLevelScorer:
        return cls(shape, backend, config.sketch_bits, config.candidate_pages)

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        levels = (_FIRST_BITS, bits)
        return sum(RotatedSketchScorer.page_bytes(page_size, head_dim, b) for b in levels)

    @property
    def bytes_per_page(self) -> int:
        """Of both levels; ``read_bytes`` says what was read."""
        return self.first.bytes_per_page + self.second.bytes_per_page

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        self.first.encode(layer, slots, k_cache)
        self.second.encode(layer, slots, k_cache)
        self.advance(layer, slots)

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        shape = self.shape
        rotated = self.first.rotate(q)
        log_mass = self.first.score_codes(layer, rotated, batch, sm_scale)
        candidates = candidate_pages(
            log_mass,
            batch.seq_lens,
            batch.active,
            num_kv_heads=shape.num_kv_heads,
            page_size=shape.page_size,
            count=self.candidate_pages,
            backend=self.backend,
        )
        self.second.score_codes(layer, rotated, batch, sm_scale, candidates.flags, log_mass)
        if batch is not self._batch:  # the same for every layer of a step
            pages = batch.pages_scored(shape.page_size)
            self._batch, self._first_bytes = batch, (pages * self.first.bytes_per_page).float()
        extra = candidates.count * self.second.bytes_per_page
        self._read[layer] = self._first_bytes[:, None] + extra
        return log_mass

    def read_bytes(self, layer: int) -> torch.Tensor | None:
        return self._read.get(layer)

    def state_tensors(self) -> list[torch.Tensor]:
        return [*self.first.state_tensors(), *self.second.state_tensors()]
