"""Read everything: the exact answer, and the yardstick of every other policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_psa.policies.base import Policy
from sgl_psa.row import DENSE, Row

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig
    from sgl_psa.rule import RequestRule


def dense_row(rule: RequestRule, config: PSAConfig) -> Row:
    """All pages in one pass; ``rule`` and ``config`` do not matter."""
    return Row(DENSE)


DENSE_POLICY = Policy("dense", dense_row, reads_scores=False)
