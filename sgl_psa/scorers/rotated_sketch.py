from __future__ import annotations

import torch
from sgl_psa_kernels import key_sketch

from sgl_psa.scorers.base import CacheShape
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

    def rotate(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, D] in the basis of the sketches, float32; as they are for the C++ kernel,
        which rotates them itself."""
        return q if self.backend == "cpu" else q.float() @ self.rotation
