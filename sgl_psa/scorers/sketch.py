from __future__ import annotations

from sgl_psa.scorers.low_bit import LowBitScorer


class SketchScorer(LowBitScorer):
    """Affine values: scale and zero point."""

    name = "sketch"
    values = 2
