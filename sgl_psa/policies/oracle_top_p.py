"""Top-p by the true masses: the fewest pages that reach a coverage, for comparison.

No method that reads fewer pages covers as much. Its scorer reads every key and counts no bytes, so
its fractions bound what any estimate can reach; they are not a cost.
"""

from __future__ import annotations

from sgl_psa.policies.base import Policy, chosen_row
from sgl_psa.policies.top_p import select

ORACLE_TOP_P = Policy(
    "oracle_top_p", chosen_row, limit="coverage", select=select, scorers=("exact",)
)
