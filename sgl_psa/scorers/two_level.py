"""Two levels of rotated sketches: one bit a key element everywhere, more bits where it may matter.

The first level scores every page from its 1-bit sketch. The second reads ``sketch_bits`` bits a key
element of the candidate pages only, at most ``candidate_pages`` of a KV head whatever the context.
All other pages keep their first estimate, which is calibrated, so that a page that was passed over
can still be attended. In a batch of so few pages that all would be candidates only the second level
is read. Page means, moments and boxes do not serve as a first level: even among 32
pages of their choice single keys that hold most of the mass are missing
(``benchmark/scorer_recall.py`` measures it).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels import key_sketch
from sgl_psa_kernels.candidate_pages import PreparedChoice, candidate_pages

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, PageBatch, ScoredStep, Scorer
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
        self._write: key_sketch.PreparedWrite | None = None
        self._choice: PreparedChoice | None = None
        self._step: ScoredStep | None = None

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
        self._sketch(layer, slots, k_cache, in_order=False)

    def on_rows(self, layer: int, slots: torch.Tensor, k: torch.Tensor) -> None:
        self._sketch(layer, slots, k, in_order=True)

    def _sketch(self, layer: int, slots: torch.Tensor, k: torch.Tensor, *, in_order: bool) -> None:
        first, second = self.first, self.second
        if self.backend == "cpu":
            if self._write is None or not self._write.serves(k, in_order):
                self._write = key_sketch.PreparedWrite(
                    k,
                    [(level.bits, level.codes, level.affine) for level in (first, second)],
                    self.watermark,
                    first.signs,
                    page_size=self.shape.page_size,
                    in_order=in_order,
                )
            self._write(layer, slots, k)
        else:
            first.encode(layer, slots, k, in_order=in_order)
            second.encode(layer, slots, k, in_order=in_order)
            self.advance(layer, slots)

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        step = self._step
        if step is None or step.batch is not batch:
            step = self._begin(batch, q.shape[1])
        rotated = self.first.rotate(q)
        if self._one_level(batch):
            step.chosen[layer] = batch.pages_scored(self.shape.page_size)[:, None]
            return self.second.score_codes(layer, rotated, batch, sm_scale)
        log_mass = self.first.score_codes(layer, rotated, batch, sm_scale)
        flags = self._choose_pages(layer, log_mass, step)
        return self.second.score_codes(layer, rotated, batch, sm_scale, flags, log_mass)

    def _one_level(self, batch: PageBatch) -> bool:
        """Whether every page is a candidate, whatever the first level says."""
        return batch.page_table.shape[1] <= self.candidate_pages

    def _begin(self, batch: PageBatch, num_qo_heads: int) -> ScoredStep:
        """Take up a decode step."""
        shape = self.shape
        rows, max_pages = batch.page_table.shape
        chosen = torch.zeros(
            shape.num_layers, rows, shape.num_kv_heads, dtype=torch.int32, device=shape.device
        )
        self._step = ScoredStep(batch, chosen)
        if self.backend == "cpu":
            self._choice = PreparedChoice(
                (rows, num_qo_heads, max_pages),
                batch.seq_lens,
                batch.active,
                num_kv_heads=shape.num_kv_heads,
                page_size=shape.page_size,
                count=self.candidate_pages,
            )
        return self._step

    def _choose_pages(self, layer: int, log_mass: torch.Tensor, step: ScoredStep) -> torch.Tensor:
        """Flags of the candidates; their number goes to ``step.chosen``."""
        if self._choice is not None:
            self._choice(log_mass, step.chosen, layer)
            return self._choice.flags
        batch = step.batch
        candidates = candidate_pages(
            log_mass,
            batch.seq_lens,
            batch.active,
            num_kv_heads=self.shape.num_kv_heads,
            page_size=self.shape.page_size,
            count=self.candidate_pages,
            backend=self.backend,
        )
        step.chosen[layer] = candidates.count
        return candidates.flags

    @property
    def step(self) -> ScoredStep | None:
        return self._step

    def read_bytes(self, layer: int | slice, step: ScoredStep | None = None) -> torch.Tensor | None:
        step = step or self._step
        if step is None:
            return None
        second = step.chosen[layer] * float(self.second.bytes_per_page)
        if self._one_level(step.batch):
            return second
        first = step.batch.pages_scored(self.shape.page_size) * float(self.first.bytes_per_page)
        return first[:, None] + second

    def state_tensors(self) -> list[torch.Tensor]:
        return [*self.first.state_tensors(), *self.second.state_tensors()]
