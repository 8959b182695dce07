"""Stop rules of the progressive loop, as thresholds on log masses.

Notation, per request, layer and query head: Z_P is the mass of the pages attended so far (exact),
Z_b the estimated mass of an unread page b, Z_R the sum of Z_b over all unread pages.

* coverage: stop when Z_P / (Z_P + Z_R) >= p, that is log Z_R <= log Z_P + log((1 - p) / p). The
  estimate of log Z_R is corrected by kappa = mean + c * std of (exact - estimated) log mass over
  the pages of the last group. Source: PSA, arXiv 2503.00392, with the correction added.
  Where earlier steps are remembered (:mod:`sgl_psa.residuals`), their correction is in force
  before the first group and kappa never below it: that of a last group of few pages is now and
  then far too low. The first step of a request without such a memory is conservative.
  Conservative: mean and deviation are of every page attended so far, and kappa is never below 0.
  Pages are attended in order of their estimates, so those read last are the ones that the
  estimates flatter; sinks and recent pages are read whatever their estimates say and show a bias
  of the scorer from the start. c is at least ``CONSERVATIVE_STD``, found by ``sgl_psa.audit``.
* marginal: stop when no unread page has Z_b > delta * Z_P. It spends nothing on a diffuse tail of
  pages that are each negligible.
* change: the marginal rule by what a page can change. Reading page b moves the output o by
  Z_b / (Z_P + Z_b) * |o_b - o|, at most about Z_b / Z_P times the largest norm of its values.
  So every Z_b is weighted by w_b = max |v_i| over the page / mean of that maximum over the row's
  pages of the KV head. On the embedded model it reads about what marginal reads, page for page
  (``benchmark/stop_rules.py``).

All query heads of a KV head must agree before the loop stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sgl_psa.row import CONSERVATIVE, COVERAGE, MARGINAL, Row

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig
    from sgl_psa.rule import RequestRule

#: Least standard deviations in the correction of the conservative coverage rule.
CONSERVATIVE_STD = 3.0


def coverage_row(rule: RequestRule, config: PSAConfig) -> Row:
    """Threshold log((1 - p) / p); ``rule.coverage`` must be below 1."""
    threshold = math.log1p(-rule.coverage) - math.log(rule.coverage)
    if config.conservative:
        return Row(CONSERVATIVE, threshold, 0.0, max(config.correction_std, CONSERVATIVE_STD))
    return Row(COVERAGE, threshold, -math.inf, config.correction_std)


def marginal_row(rule: RequestRule, config: PSAConfig) -> Row:
    """Threshold log(delta); ``rule.delta`` must be above 0."""
    return Row(MARGINAL, math.log(rule.delta))


def change_row(rule: RequestRule, config: PSAConfig) -> Row:
    """The marginal row; the wrapper weights the estimates (:mod:`sgl_psa.value_norms`)."""
    return marginal_row(rule, config)


#: stop rule name -> row builder.
STOP_RULES: dict[str, Callable[[RequestRule, PSAConfig], Row]] = {
    "coverage": coverage_row,
    "marginal": marginal_row,
    "change": change_row,
}
