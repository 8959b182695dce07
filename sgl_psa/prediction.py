"""The first round of decode steps, as large as :mod:`sgl_psa.budget` predicts."""

from __future__ import annotations

from pathlib import Path

import torch

from sgl_psa.budget import BudgetPrior, BudgetState
from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers.base import CacheShape


def least_pages(config: PSAConfig) -> int:
    """Pages of a first round without prediction: the forced ones and one group."""
    return config.sink_pages + max(config.recent_pages, 1) + config.group_pages


class Predictor:
    """Predicts for all layers of a step when it is planned, and learns from it when it is finished.

    Attributes:
        inherited: requests that started from the state of a prefix that they share.
    """

    def __init__(
        self, config: PSAConfig, shape: CacheShape, prior: BudgetPrior | None = None
    ) -> None:
        """
        Args:
            prior: ``None``: from the file that ``config.budget_prior`` names, if it names one.

        Raises:
            PriorError: the file cannot be used for a cache of this shape.
        """
        layers, heads = shape.num_layers, shape.num_kv_heads
        if prior is None and config.budget_prior:
            prior = BudgetPrior.load(Path(config.budget_prior), layers, heads)
        self.prior = None if prior is None else prior.to(shape.device)
        self.state = BudgetState(
            0,
            layers,
            heads,
            rho=config.predict_rho,
            least=least_pages(config),
            device=shape.device,
        )
        self.page_size = shape.page_size
        self.inherited = 0
        self._slots = torch.empty(0)
        self._valid = torch.empty(0)
        self._first: torch.Tensor | None = None

    def plan(
        self, num_slots: int, slots: torch.Tensor, seq_lens: torch.Tensor, rows: RuleRows
    ) -> None:
        """Open a step.

        Args:
            num_slots: of the request pool.
            slots: int64 [B].
            seq_lens: int32 [B], the current token included.
            rows: with the modes that the step runs with.
        """
        assert rows.generation is not None, "the rule table was made without predict"
        pages = torch.div(seq_lens + self.page_size - 1, self.page_size, rounding_mode="floor")
        self.state.reserve(num_slots)
        self.state.start(slots, rows.generation, pages, self.prior)
        self._slots, self._valid = slots, rows.stops & (rows.mode != 0)
        first = self.state.predict(slots, pages)
        self._first = torch.where(self._valid[:, None], first, 0)

    def first_pages(self, layer: int) -> torch.Tensor:
        """Pages to have attended when the first round of the open step ends, int32 [B, Hkv].

        0, that is one group, for rows that no stop rule ends.
        """
        assert self._first is not None
        return self._first[layer]

    def learn(self, rounds: torch.Tensor) -> None:
        """Close the step.

        Args:
            rounds: [L, B, Hkv], rounds that each row took.
        """
        self.state.update(self._slots, rounds > 1, self._valid)

    def snapshot(self, slot: int) -> torch.Tensor:
        """State of the request in ``slot``, float32 [L, Hkv]."""
        return self.state.snapshot(slot)

    def inherit(self, slot: int, generation: int, snapshot: torch.Tensor) -> None:
        """Start the request that took ``slot`` from the state of the prefix that it shares."""
        self.state.inherit(slot, generation, snapshot)
        self.inherited += 1


def prior_settings(config: PSAConfig, page_size: int) -> dict[str, object]:
    """The settings on which the page counts of a prior depend, by name; what its file records."""
    rule = RequestRule.default(config)
    return {
        "stop": rule.limit,
        "knob": rule.knob,
        "scorer": config.scorer,
        "sketch_bits": config.sketch_bits,
        "summary_bits": config.summary_bits,
        "group_pages": config.group_pages,
        "sink_pages": config.sink_pages,
        "recent_pages": config.recent_pages,
        "conservative": config.conservative,
        "correction_std": config.correction_std,
        "page_size": page_size,
        "rho": config.predict_rho,
    }
