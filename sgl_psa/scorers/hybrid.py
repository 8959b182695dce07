"""Hybrid page summary: moments for diffuse pages, the shrunken box for pages with one spike.

Estimate: logaddexp(log n + x.mean + x^2.variance / 2, x.centre + |x|.radius), x the scaled query.
Sources: second-order cumulant of the page mass; cuboid-mean of ArkVale (NeurIPS 2024).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels import page_summary

from sgl_psa.scorers import watermark as wm
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_VECTORS = 4  # mean, variance, centre, radius
_ELEMENT_BYTES = 2  # bfloat16


class HybridScorer(Scorer):
    """State bfloat16 [L, pages, Hkv, 4, D]: mean, variance, box centre, mean distance from it."""

    name = "hybrid"

    def __init__(self, shape: CacheShape, backend: str) -> None:
        super().__init__(shape, backend)
        self.summary = torch.zeros(
            shape.num_layers,
            shape.num_pages,
            shape.num_kv_heads,
            _VECTORS,
            shape.head_dim,
            dtype=torch.bfloat16,
            device=shape.device,
        )

    @staticmethod
    def page_bytes(page_size: int, head_dim: int, bits: int) -> int:
        return _VECTORS * _ELEMENT_BYTES * head_dim

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.shape.page_size, self.shape.head_dim, 0)

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        if slots.numel() == 0:
            return
        self.advance(layer, slots)
        pages = wm.touched_pages(slots, self.shape.page_size)
        page_summary.update(
            k_cache,
            pages,
            self.watermark[layer][pages],
            self.summary[layer],
            page_size=self.shape.page_size,
            backend=self.backend,
        )

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        return page_summary.score(
            q,
            self.summary[layer],
            self.watermark[layer],
            batch.page_table,
            batch.seq_lens,
            batch.active,
            page_size=self.shape.page_size,
            sm_scale=sm_scale,
            backend=self.backend,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.summary]
