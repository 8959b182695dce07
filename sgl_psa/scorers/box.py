"""Bounding box of a page's keys: log n + sum_j max(x_j low_j, x_j high_j), x the scaled query.

Never below the page's log mass (nor, without log n, below its best logit), up to the float32
rounding of the sum: the stored box is rounded outward. A bound, not an estimate: many nats loose.
Source: Quest (arXiv 2406.10774).
"""

from __future__ import annotations

from sgl_psa.scorers.page_summary import PageSummaryScorer


class BoxScorer(PageSummaryScorer):
    """Two vectors a page: the centre of the box, and its half width."""

    name = kind = "box"
