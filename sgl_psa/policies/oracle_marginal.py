"""The marginal stop rule by the true masses, for comparison: what a perfect scorer would read.

Its scorer reads every key and counts no bytes: its fractions are a bound, not a cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_psa.policies.base import Policy
from sgl_psa.row import Row
from sgl_psa.stop import marginal_row

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig
    from sgl_psa.rule import RequestRule


def oracle_marginal_row(rule: RequestRule, config: PSAConfig) -> Row:
    """The marginal rule at ``rule.delta``; 0 is the dense pass itself."""
    return Row() if rule.is_dense else marginal_row(rule, config)


ORACLE_MARGINAL = Policy(
    "oracle_marginal", oracle_marginal_row, limit="marginal", scorers=("exact",)
)
