"""Key sketches: every key element in 1, 2 or 4 bits, per token and KV head.

A page's mass is the log-sum-exp of the logits of its sketched keys. Quantised keys rank pages
nearly like the exact keys, where bounds and moments of a page do not. Sources of the idea:
low-bit key copies for selection (Twilight, arXiv 2502.02770), 1-bit codes (RaBitQ, arXiv
2405.12497).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels import key_sketch

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_AFFINE_BYTES = 4  # scale and zero point, float16 each


class SketchScorer(Scorer):
    """Codes uint8 [L, pages, Hkv, P, D * bits / 8]; affine (scale, zero) float16 [..., P, 2]."""

    name = "sketch"

    def __init__(self, shape: CacheShape, backend: str, bits: int) -> None:
        """
        Args:
            bits: 1, 2 or 4.

        Raises:
            ValueError: the head dimension does not fill whole bytes.
        """
        if shape.head_dim * bits % 8:
            raise ValueError(f"sketch_bits={bits} needs a head dimension that fills whole bytes")
        super().__init__(shape, backend)
        self.bits = bits
        pages = (shape.num_layers, shape.num_pages, shape.num_kv_heads, shape.page_size)
        self.codes = torch.zeros(
            *pages, shape.head_dim * bits // 8, dtype=torch.uint8, device=shape.device
        )
        self.affine = torch.zeros(*pages, 2, dtype=torch.float16, device=shape.device)

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> SketchScorer:
        return cls(shape, backend, config.sketch_bits)

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        return page_size * (head_dim * bits // 8 + _AFFINE_BYTES)

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.shape.page_size, self.shape.head_dim, self.bits)

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        key_sketch.write(
            k_cache,
            slots,
            self.codes[layer],
            self.affine[layer],
            bits=self.bits,
            page_size=self.shape.page_size,
            backend=self.backend,
        )
        self.advance(layer, slots)

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        return key_sketch.score(
            q,
            self.codes[layer],
            self.affine[layer],
            self.watermark[layer],
            batch.page_table,
            batch.seq_lens,
            batch.active,
            bits=self.bits,
            page_size=self.shape.page_size,
            sm_scale=sm_scale,
            backend=self.backend,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.affine]
