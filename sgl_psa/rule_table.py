"""Per-request rules on the device, indexed by the request's slot in the server's request pool."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES
from sgl_psa.rule import RequestRule


class RuleRows(NamedTuple):
    """Rules of the rows of one batch; each tensor has length B. See :class:`sgl_psa.row.Row`."""

    mode: torch.Tensor
    threshold: torch.Tensor
    kappa_floor: torch.Tensor
    kappa_std: torch.Tensor


class RuleTable:
    """One :class:`~sgl_psa.row.Row` a request slot; slots never set hold the default rule."""

    def __init__(self, config: PSAConfig, num_slots: int, device: torch.device | str) -> None:
        self.config = config
        default = RequestRule.default(config)
        self.rules: list[RequestRule] = [default] * num_slots
        row = POLICIES[default.policy](default, config)
        self._mode = torch.full((num_slots,), row.mode, dtype=torch.int32, device=device)
        self._floats = torch.tensor(row[1:], dtype=torch.float32, device=device)[:, None].repeat(
            1, num_slots
        )

    def set(self, slot: int, rule: RequestRule) -> None:
        """Give ``slot`` a rule; writes to the device only when the rule changes."""
        if self.rules[slot] == rule:
            return
        row = POLICIES[rule.policy](rule, self.config)
        self.rules[slot] = rule
        self._mode[slot] = row.mode
        self._floats[:, slot] = torch.tensor(row[1:], dtype=torch.float32)

    def rows(self, slots: torch.Tensor) -> RuleRows:
        """The rules of ``slots``, int64 [B]."""
        threshold, floor, std = self._floats[:, slots].contiguous().unbind(0)
        return RuleRows(self._mode[slots], threshold, floor, std)
