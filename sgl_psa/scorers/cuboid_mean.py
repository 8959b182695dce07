"""Cuboid mean: x.centre + |x|.radius, centre that of the keys' box, radius the mean |k - centre|.

The box shrunk to where the keys are: finds spikes that means dilute, without the slack of the
bound. Source: ArkVale (NeurIPS 2024).
"""

from __future__ import annotations

from sgl_psa.scorers.page_summary import PageSummaryScorer


class CuboidMeanScorer(PageSummaryScorer):
    """Two vectors a page: box centre, and mean distance from it."""

    name = kind = "cuboid_mean"
