"""Progressive Sparse Attention (arXiv 2503.00392): best pages first, until a stop rule holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_psa.policies.base import Policy
from sgl_psa.row import DENSE, Row
from sgl_psa.stop import STOP_RULES

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig
    from sgl_psa.rule import RequestRule


def psa_row(rule: RequestRule, config: PSAConfig) -> Row:
    """The stop rule of ``rule``; a knob that asks for everything is the dense pass itself."""
    return Row(DENSE) if rule.is_dense else STOP_RULES[rule.stop](rule, config)


PSA = Policy("psa", psa_row)
