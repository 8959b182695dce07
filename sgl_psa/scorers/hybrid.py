"""Hybrid page summary: moments for diffuse pages, the shrunken box for pages with one spike.

Estimate: logaddexp(log n + x.mean + x^2.variance / 2, x.centre + |x|.radius), x the scaled query.
Sources: second-order cumulant of the page mass; cuboid-mean of ArkVale (NeurIPS 2024).
"""

from __future__ import annotations

from sgl_psa.scorers.page_summary import PageSummaryScorer


class HybridScorer(PageSummaryScorer):
    """Four vectors a page: mean, variance, box centre, mean distance from it."""

    name = kind = "hybrid"
