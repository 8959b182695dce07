"""Rotated key sketches: every element of a randomly rotated key in 1, 2 or 4 bits, one scale a key.

The rotation makes the elements of any key alike, so equal steps around zero suffice: fewer bytes
than the plain sketch, and less error. The scale makes the estimate of q.k exact along the key.
Sketches of the keys themselves, not of residuals to a page mean: nothing is rewritten when a page
grows. Sources: RaBitQ (arXiv 2405.12497); Hadamard rotations as in QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels import key_sketch

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_SCALE_BYTES = 2  # float16


class RotatedSketchScorer(Scorer):
    """Codes uint8 [L, pages, Hkv, P, D * bits / 8]; scale float16 [..., P, 1]."""

    name = "rotated_sketch"

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
        self.scale = torch.zeros(*pages, 1, dtype=torch.float16, device=shape.device)
        self.signs = key_sketch.rotation_signs(shape.head_dim, shape.device)
        self.rotation = key_sketch.rotation_matrix(shape.head_dim, shape.device)

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> RotatedSketchScorer:
        return cls(shape, backend, config.sketch_bits)

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        return page_size * (head_dim * bits // 8 + _SCALE_BYTES)

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.shape.page_size, self.shape.head_dim, self.bits)

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        self.encode(layer, slots, k_cache)
        self.advance(layer, slots)

    def encode(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        """Sketch the keys at ``slots``; the watermark stays."""
        key_sketch.write(
            k_cache,
            slots,
            self.codes[layer],
            self.scale[layer],
            self.signs,
            bits=self.bits,
            page_size=self.shape.page_size,
            backend=self.backend,
        )

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        return self.score_rotated(layer, self.rotate(q), batch, sm_scale)

    def rotate(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, D] in the basis of the sketches, float32."""
        return q.float() @ self.rotation

    def score_rotated(
        self,
        layer: int,
        rotated: torch.Tensor,
        batch: PageBatch,
        sm_scale: float,
        candidates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``score`` of rotated queries; -inf at pages where ``candidates`` (uint8
        [B, Hkv, max_pages]) is 0, whose sketches are not read."""
        return key_sketch.score(
            rotated,
            self.codes[layer],
            self.scale[layer],
            self.watermark[layer],
            batch.page_table,
            batch.seq_lens,
            batch.active,
            candidates,
            bits=self.bits,
            page_size=self.shape.page_size,
            sm_scale=sm_scale,
            backend=self.backend,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scale]
