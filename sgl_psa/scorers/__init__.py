"""Scorers estimate the attention mass of a page without reading its keys. One a file, one table."""

from __future__ import annotations

from collections.abc import Callable

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, Scorer
from sgl_psa.scorers.hybrid import HybridScorer
from sgl_psa.scorers.sketch import SketchScorer

#: scorer name -> builder.
SCORERS: dict[str, Callable[[PSAConfig, CacheShape, str], Scorer]] = {
    "sketch": lambda config, shape, backend: SketchScorer(shape, backend, config.sketch_bits),
    "hybrid": lambda config, shape, backend: HybridScorer(shape, backend),
}


def make_scorer(config: PSAConfig, shape: CacheShape, backend: str) -> Scorer:
    """The scorer named by ``config.scorer``, its state allocated for ``shape``.

    Raises:
        ValueError: the cache's shape does not suit the scorer.
    """
    return SCORERS[config.scorer](config, shape, backend)


__all__ = ["SCORERS", "CacheShape", "Scorer", "make_scorer"]
