from __future__ import annotations

import torch
from sgl_psa_kernels import key_sketch

from sgl_psa.scorers.base import CacheShape, PageBatch
from sgl_psa.scorers.low_bit import LowBitScorer


class RotatedSketchScorer(LowBitScorer):
    """Affine value: the scale."""

    name = "rotated_sketch"
    values = 1

    def __init__(self, shape: CacheShape, backend: str, bits: int) -> None:
        """As of :class:`LowBitScorer`."""
        super().__init__(shape, backend, bits)
        self.signs = key_sketch.rotation_signs(shape.head_dim, shape.device)
        self.rotation = key_sketch.rotation_matrix(shape.head_dim, shape.device)

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        return self.score_codes(layer, self.rotate(q), batch, sm_scale)

    def rotate(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, D] in the basis of the sketches, float32."""
        return q.float() @ self.rotation
