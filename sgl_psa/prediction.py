"""What earlier steps tell a decode step: the size of its first round, as :mod:`sgl_psa.budget`
predicts it, and under the coverage rule the correction of :mod:`sgl_psa.residuals`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sgl_psa.budget import BudgetPrior, BudgetState
from sgl_psa.config import PSAConfig
from sgl_psa.residuals import KEPT_STD, ResidualState
from sgl_psa.row import CONSERVATIVE, COVERAGE
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers.base import CacheShape
from sgl_psa.stop import CONSERVATIVE_STD


def least_pages(config: PSAConfig) -> int:
    """Pages of a first round without prediction: the forced ones and one group."""
    return config.sink_pages + max(config.recent_pages, 1) + config.group_pages


class Snapshot(NamedTuple):
    """State of one request; what a prefix node keeps.

    Attributes:
        log_needed: float32 [L, Hkv], see :class:`~sgl_psa.budget.BudgetState`.
        residuals: float32 [L, Hq, 3], see :class:`~sgl_psa.residuals.ResidualState`; ``None`` if no
            request has had any.
    """

    log_needed: torch.Tensor
    residuals: torch.Tensor | None = None


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
        self.residuals = ResidualState(layers, device=shape.device)
        self.page_size = shape.page_size
        self.inherited = 0
        self._slots = torch.empty(0)
        self._valid = torch.empty(0)
        self._first: torch.Tensor | None = None
        self._std = torch.empty(0)
        self._tracked: torch.Tensor | None = None
        self._kappa: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None

    def plan(
        self,
        num_slots: int,
        slots: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: RuleRows,
        coverage_rows: int,
    ) -> RuleRows:
        """Open a step.

        Args:
            num_slots: of the request pool.
            slots: int64 [B].
            seq_lens: int32 [B], the current token included.
            rows: with the modes that the step runs with, no stop rule where a row is dense.
            coverage_rows: how many of them have mode ``COVERAGE``.

        Returns:
            ``rows``, those under the coverage rule conservative until they have residuals.
        """
        assert rows.generation is not None, "the rule table was made without predict"
        pages = torch.div(seq_lens + self.page_size - 1, self.page_size, rounding_mode="floor")
        self.state.reserve(num_slots)
        fresh = self.state.start(slots, rows.generation, pages, self.prior)
        self.residuals.start(num_slots, slots, fresh)
        self._slots, self._valid = slots, rows.stops
        self._tracked, self._kappa, self._sums = None, None, None
        if coverage_rows:
            self._tracked = rows.stops & (rows.mode == COVERAGE)
            self._std = rows.kappa_std.clamp(min=KEPT_STD)
            blank = self._tracked & ~self.residuals.known(slots)
            rows = rows._replace(
                mode=rows.mode.masked_fill(blank, CONSERVATIVE),
                kappa_floor=rows.kappa_floor.masked_fill(blank, 0.0),
                kappa_std=torch.where(
                    blank, rows.kappa_std.clamp(min=CONSERVATIVE_STD), rows.kappa_std
                ),
            )
        first = self.state.predict(slots, pages)
        self._first = torch.where(self._valid[:, None], first, 0)
        return rows

    def first_pages(self, layer: int) -> torch.Tensor:
        """Pages to have attended when the first round of the open step ends, int32 [B, Hkv].

        0, that is one group, for rows that no stop rule ends.
        """
        assert self._first is not None
        return self._first[layer]

    def correction(
        self, layer: int, num_qo_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """What the loop is given in the open step, if a row has the coverage rule.

        Returns:
            kappa_start float32 [B, Hq], 0 for the other rows and before the first residuals; and
            where the loop writes its residuals, float32 [B, Hq, 3].
        """
        if self._tracked is None:
            return None, None
        if self._kappa is None or self._sums is None:
            self.residuals.reserve(len(self.state.generation), num_qo_heads)
            self._kappa = self.residuals.corrections(self._slots, self._std, self._tracked)
            self._sums = torch.zeros(*self._kappa.shape, 3, device=self._kappa.device)
        return self._kappa[layer], self._sums[layer]

    def pin(self, first: torch.Tensor, kappa: torch.Tensor, sums: torch.Tensor) -> None:
        """Move what the open step is given, and where it writes, to the caller's buffers, each
        contiguous within a layer.

        Args:
            first, kappa, sums: int32 [L, B, Hkv], float32 [L, B, Hq] and float32 [L, B, Hq, 3].
        """
        start = self.correction(0, kappa.shape[2])[0]
        assert start is not None and self._first is not None and self._kappa is not None
        self._first = first.copy_(self._first)
        self._kappa, self._sums = kappa.copy_(self._kappa), sums

    def learn(self, rounds: torch.Tensor) -> None:
        """Close the step.

        Args:
            rounds: [L, B, Hkv], rounds that each row took.
        """
        self.state.update(self._slots, rounds > 1, self._valid)
        if self._tracked is not None and self._sums is not None:
            self.residuals.update(self._slots, self._sums, self._tracked)

    def snapshot(self, slot: int) -> Snapshot:
        """State of the request in ``slot``."""
        return Snapshot(self.state.snapshot(slot), self.residuals.snapshot(slot))

    def inherit(self, slot: int, generation: int, snapshot: Snapshot) -> None:
        """Start the request that took ``slot`` from the state of the prefix that it shares."""
        self.state.inherit(slot, generation, snapshot.log_needed)
        self.residuals.inherit(slot, snapshot.residuals)
        for tensor in snapshot:
            if tensor is not None and tensor.is_cuda:
                # It was made on the scheduler's stream and may be freed there while the copy waits.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.inherited += 1


def prior_settings(config: PSAConfig, page_size: int) -> dict[str, object]:
    """The settings on which the page counts of a prior depend, by name; what its file records."""
    rule = RequestRule.default(config)
    return {
        "stop": rule.limit,
        "knob": rule.knob,
        "scorer": config.scorer,
        "sketch_bits": config.sketch_bits,
        "candidate_pages": config.candidate_pages,
        "summary_bits": config.summary_bits,
        "group_pages": config.group_pages,
        "sink_pages": config.sink_pages,
        "recent_pages": config.recent_pages,
        "conservative": config.conservative,
        "correction_std": config.correction_std,
        "page_size": page_size,
        "rho": config.predict_rho,
    }
