"""The stop rules and correction modes that ``python -m sgl_psa.audit`` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_psa.config import PSAConfig, ScorerName
from sgl_psa.rule_table import RuleRows

REQUESTED = (0.90, 0.95, 0.99)
DELTAS = (0.3, 0.1, 0.03)
#: plain: the estimates as they are; corrected: by the last group; tracked: also by what earlier
#: steps saw (``predict``); conservative: by everything read.
MODES = ("plain", "corrected", "tracked", "conservative")
#: Makes mean + std * deviation fall below the floor of 0, so that nothing is corrected.
_NO_CORRECTION = -1e30


@dataclass(frozen=True)
class Setting:
    """One line of the table: a stop rule, a mode, and the knob (coverage or delta)."""

    config: PSAConfig
    mode: str
    knob: float

    def rows(self, rows: RuleRows) -> RuleRows:
        """The rule rows of the configuration, changed where no configuration says it."""
        if self.config.stop != "coverage" or self.mode != "plain":
            return rows
        return rows._replace(
            kappa_floor=torch.zeros_like(rows.kappa_floor),
            kappa_std=torch.full_like(rows.kappa_std, _NO_CORRECTION),
        )


def settings(scorer: ScorerName) -> list[Setting]:
    """Every mode at every requested coverage, and the marginal rule at every delta."""
    table = []
    for mode in MODES:
        for coverage in REQUESTED:
            config = PSAConfig(
                stop="coverage",
                coverage=coverage,
                conservative=mode == "conservative",
                predict=mode == "tracked",
                scorer=scorer,
                min_context=0,
            )
            table.append(Setting(config, mode, coverage))
    for delta in DELTAS:
        config = PSAConfig(stop="marginal", delta=delta, scorer=scorer, min_context=0)
        table.append(Setting(config, "plain", delta))
    return table
