"""What the scorers that keep a few vectors a page have in common; one file each says which."""

from __future__ import annotations

from typing import ClassVar

import torch
from sgl_psa_kernels import page_summary

from sgl_psa.scorers import watermark as wm
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_ELEMENT_BYTES = 2  # bfloat16


class PageSummaryScorer(Scorer):
    """State bfloat16 [L, pages, Hkv, vectors, D].

    A class attribute ``kind`` names the vectors and the estimate, a key of
    ``sgl_psa_kernels.page_summary.VECTORS``. A page that grows is summarised anew from its keys.
    """

    kind: ClassVar[str]

    def __init__(self, shape: CacheShape, backend: str) -> None:
        super().__init__(shape, backend)
        self.summary = torch.zeros(
            shape.num_layers,
            shape.num_pages,
            shape.num_kv_heads,
            page_summary.VECTORS[self.kind],
            shape.head_dim,
            dtype=torch.bfloat16,
            device=shape.device,
        )

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        return page_summary.VECTORS[cls.kind] * _ELEMENT_BYTES * head_dim

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
            kind=self.kind,
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
            kind=self.kind,
            page_size=self.shape.page_size,
            sm_scale=sm_scale,
            backend=self.backend,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.summary]
