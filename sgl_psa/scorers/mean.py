"""Page mean: log n + x.mean, x the scaled query. Jensen: never above the page's log mass.

The cheapest summary and the coarsest: one spike among n keys is diluted n times.
Source: page means as in MoBA (arXiv 2502.13189).
"""

from __future__ import annotations

from sgl_psa.scorers.page_summary import PageSummaryScorer


class MeanScorer(PageSummaryScorer):
    """One vector a page: the mean of its keys."""

    name = kind = "mean"
