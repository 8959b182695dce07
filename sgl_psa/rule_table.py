"""Per-request rules on the device, indexed by the request's slot in the server's request pool."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES
from sgl_psa.rule import RequestRule


class Pick(NamedTuple):
    """A row of a batch whose policy chooses pages outright; plain values on the host.

    Attributes:
        row, slot: places in the batch and in the table.
        rule: of the request.
        generation: changes whenever another request takes the slot.
    """

    row: int
    slot: int
    rule: RequestRule
    generation: int


class RuleRows(NamedTuple):
    """Rules of the rows of one batch; each tensor has length B. See :class:`sgl_psa.row.Row`.

    Attributes:
        scored: bool, rows whose policy reads scores.
        weighted: bool, rows of stop rule ``change``, whose estimates are weighted by value norms.
        picks: rows whose policy chooses pages outright.
        stops: bool, rows whose reading a stop rule ends.
        generation: int64, changes whenever another request takes a row's slot; only of servers
            that predict.
    """

    mode: torch.Tensor
    threshold: torch.Tensor
    kappa_floor: torch.Tensor
    kappa_std: torch.Tensor
    scored: torch.Tensor
    weighted: torch.Tensor
    picks: tuple[Pick, ...]
    stops: torch.Tensor
    generation: torch.Tensor | None = None


class RuleTable:
    """One :class:`~sgl_psa.row.Row` a request slot; slots never set hold the default rule."""

    def __init__(self, config: PSAConfig, num_slots: int, device: torch.device | str) -> None:
        self.config = config
        default = RequestRule.default(config)
        policy = POLICIES[default.policy]
        row = policy.row(default, config)
        self.rules: list[RequestRule] = [default] * num_slots
        self._generation = [0] * num_slots
        self._generations = (
            torch.zeros(num_slots, dtype=torch.int64, device=device) if config.predict else None
        )
        self._kept: tuple[list[int], RuleRows] | None = None
        self._choosing = set(range(num_slots)) if policy.select else set()
        self._mode = torch.full((num_slots,), row.mode, dtype=torch.int32, device=device)
        self._scored = torch.full((num_slots,), policy.reads_scores, device=device)
        self._stops = torch.full((num_slots,), policy.stops, device=device)
        self._weighted = torch.full((num_slots,), default.limit == "change", device=device)
        self._floats = torch.tensor(row[1:], dtype=torch.float32, device=device)[:, None].repeat(
            1, num_slots
        )

    def generation(self, slot: int) -> int:
        """A number that changes whenever another request takes ``slot``."""
        return self._generation[slot]

    def set(self, slot: int, rule: RequestRule) -> bool:
        """Give ``slot`` a rule; writes to the device only what changes.

        A request keeps its rule object for life, so another object is another request.

        Returns:
            Whether another request took the slot.
        """
        old, self.rules[slot] = self.rules[slot], rule
        if rule is old:
            return False
        self._kept = None
        self._generation[slot] += 1
        if self._generations is not None:
            self._generations[slot] = self._generation[slot]
        if old != rule:
            self._write(slot, rule)
        return True

    def _write(self, slot: int, rule: RequestRule) -> None:
        policy = POLICIES[rule.policy]
        row = policy.row(rule, self.config)
        if policy.select:
            self._choosing.add(slot)
        else:
            self._choosing.discard(slot)
        self._mode[slot] = row.mode
        self._scored[slot] = policy.reads_scores
        self._stops[slot] = policy.stops
        self._weighted[slot] = rule.limit == "change"
        self._floats[:, slot] = torch.tensor(row[1:], dtype=torch.float32)

    def rows(self, slots: torch.Tensor) -> RuleRows:
        """The rules of ``slots``, int64 [B]; the same object as long as nothing changes, where they
        are on the host. Otherwise they are read there only if some choose."""
        on_host = slots.tolist() if slots.is_cpu or self._choosing else []
        if slots.is_cpu and self._kept is not None and self._kept[0] == on_host:
            return self._kept[1]
        threshold, floor, std = self._floats[:, slots].contiguous().unbind(0)
        picks = tuple(
            Pick(row, slot, self.rules[slot], self._generation[slot])
            for row, slot in enumerate(on_host)
            if slot in self._choosing
        )
        rows = RuleRows(
            self._mode[slots],
            threshold,
            floor,
            std,
            self._scored[slots],
            self._weighted[slots],
            picks,
            self._stops[slots],
            None if self._generations is None else self._generations[slots],
        )
        self._kept = (on_host, rows) if slots.is_cpu else None
        return rows
