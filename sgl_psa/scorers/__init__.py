"""Scorers estimate the attention mass of a page without reading its keys. One a file, one table."""

from __future__ import annotations

from sgl_psa.config import PSAConfig
from sgl_psa.huge_pages import zero_in_huge_pages
from sgl_psa.scorers.base import CacheShape, Scorer
from sgl_psa.scorers.box import BoxScorer
from sgl_psa.scorers.cuboid_mean import CuboidMeanScorer
from sgl_psa.scorers.exact import ExactScorer
from sgl_psa.scorers.gaussian import GaussianScorer
from sgl_psa.scorers.hybrid import HybridScorer
from sgl_psa.scorers.mean import MeanScorer
from sgl_psa.scorers.rotated_sketch import RotatedSketchScorer
from sgl_psa.scorers.sketch import SketchScorer
from sgl_psa.scorers.two_level import TwoLevelScorer

#: scorer name -> class; ``build`` makes one from the settings.
SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        SketchScorer,
        HybridScorer,
        MeanScorer,
        BoxScorer,
        GaussianScorer,
        CuboidMeanScorer,
        RotatedSketchScorer,
        TwoLevelScorer,
        ExactScorer,
    )
}


def make_scorer(config: PSAConfig, shape: CacheShape, backend: str) -> Scorer:
    """The scorer named by ``config.scorer``, its state allocated for ``shape``.

    Raises:
        ValueError: the cache's shape or a setting does not suit the scorer.
    """
    scorer = SCORERS[config.scorer].build(config, shape, backend)
    for state in scorer.state_tensors():
        zero_in_huge_pages(state)
    return scorer


__all__ = ["SCORERS", "CacheShape", "Scorer", "make_scorer"]
