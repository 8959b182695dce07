"""What the scorers that keep a few vectors a page have in common; one file each says which."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from sgl_psa_kernels import page_summary

from sgl_psa.config import PSAConfig
from sgl_psa.scorers import watermark as wm
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_WORD_BYTES = 2  # bfloat16
_AFFINE_VALUES = 2  # scale and zero of a vector of 8-bit codes


class PageSummaryScorer(Scorer):
    """State bfloat16 [L, pages, Hkv, vectors, D]; in 8 bits codes uint8 of that shape, and affine
    bfloat16 [L, pages, Hkv, vectors, 2].

    A class attribute ``kind`` names the vectors and the estimate, a key of
    ``sgl_psa_kernels.page_summary.VECTORS``. A page that grows is summarised anew from its keys.
    """

    kind: ClassVar[str]

    def __init__(self, shape: CacheShape, backend: str, bits: int) -> None:
        """
        Args:
            bits: 8 or 16.
        """
        super().__init__(shape, backend)
        self.bits = bits
        vectors = (
            shape.num_layers,
            shape.num_pages,
            shape.num_kv_heads,
            page_summary.VECTORS[self.kind],
        )
        dtype = torch.uint8 if bits == 8 else torch.bfloat16
        self.summary = torch.zeros(*vectors, shape.head_dim, dtype=dtype, device=shape.device)
        self.affine = None
        if bits == 8:
            self.affine = torch.zeros(
                *vectors, _AFFINE_VALUES, dtype=torch.bfloat16, device=shape.device
            )

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> Self:
        return cls(shape, backend, config.summary_bits)

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        affine = _AFFINE_VALUES * _WORD_BYTES if bits == 8 else 0
        return page_summary.VECTORS[cls.kind] * (head_dim * bits // 8 + affine)

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.shape.page_size, self.shape.head_dim, self.bits)

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
            affine=self._affine(layer),
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
            affine=self._affine(layer),
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.summary] if self.affine is None else [self.summary, self.affine]

    def _affine(self, layer: int) -> torch.Tensor | None:
        return None if self.affine is None else self.affine[layer]
