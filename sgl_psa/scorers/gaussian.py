"""Second-order page mass: log n + x.mean + x^2.variance / 2, x the scaled query.

Exact for normally distributed keys and large n; a page with one spike is underestimated.
Source: the second-order cumulant of the log mass.
"""

from __future__ import annotations

from sgl_psa.scorers.page_summary import PageSummaryScorer


class GaussianScorer(PageSummaryScorer):
    """Two vectors a page: mean and (population) variance of its keys."""

    name = kind = "gaussian"
