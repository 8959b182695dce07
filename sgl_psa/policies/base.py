"""What a selection policy is: a row of the rule table, and for most a choice of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from sgl_psa.row import MARGINAL, Row

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig
    from sgl_psa.rule import RequestRule

Limit = Literal["coverage", "marginal", "change", "budget"]

#: What ends reading -> the field of a rule that sets it.
KNOBS: dict[Limit, str] = {
    "coverage": "coverage",
    "marginal": "delta",
    "change": "delta",
    "budget": "budget_pages",
}

#: The row of a policy that chose its pages: the loop attends every page of finite log mass.
CHOSEN = Row(MARGINAL, -1e30)


class Candidates(NamedTuple):
    """Pages of R rows in one layer, for a policy to choose from; M is the longest row's pages.

    Attributes:
        log_mass: float32 [R, Hkv, G, M], estimated log mass of each page for each of the G query
            heads of a KV head; ``None`` for a policy that does not read scores.
        exists: bool [R, 1, M], pages that hold tokens of the row.
        forced: bool [R, Hkv, M], a subset of ``exists`` that is attended whatever is chosen: sink
            and recent pages, and pages whose summary is out of date.
        pages: int64 [R, 1, 1], number of pages of each row.
        budget: int64 [R, 1, 1], ``budget_pages`` of each row's rule.
        coverage: float64 [R, 1, 1], ``coverage`` of each row's rule.
        sink_pages, recent_pages: the server's.
        sums: float32 [R, Hkv, M], attention sums of the pages over recent steps; policies with
            ``keeps_sums`` only.
        fresh: bool [R, 1, 1], rows whose sums have not begun; policies with ``keeps_sums`` only.
    """

    log_mass: torch.Tensor | None
    exists: torch.Tensor
    forced: torch.Tensor
    pages: torch.Tensor
    budget: torch.Tensor
    coverage: torch.Tensor
    sink_pages: int
    recent_pages: int
    sums: torch.Tensor | None = None
    fresh: torch.Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """A way to decide which pages a decode step reads.

    Attributes:
        name: as in ``--psa-policy`` and ``psa_policy``.
        row: the rule table's entry for a rule under this policy.
        limit: what ends reading, ``None`` where the rule's stop rule says.
        select: chooses the pages of rows outright, bool [R, Hkv, M]; forced pages are attended
            besides. ``None`` leaves the choice to the stop rule of the loop.
        scorers: scorers that it may run with, its default first; empty means any.
        reads_scores: whether pages are scored, so that the scorer's bytes count.
        keeps_sums: whether attention weights of past steps are kept for it.
    """

    name: str
    row: Callable[[RequestRule, PSAConfig], Row]
    limit: Limit | None = None
    select: Callable[[Candidates], torch.Tensor] | None = None
    scorers: tuple[str, ...] = ()
    reads_scores: bool = True
    keeps_sums: bool = False

    @property
    def stops(self) -> bool:
        """Whether a stop rule ends reading, so that how many pages it takes is to be found."""
        return self.select is None and self.reads_scores


def chosen_row(rule: RequestRule, config: PSAConfig) -> Row:
    """The row of a policy that chooses its pages; a rule that asks for all is the dense pass."""
    return Row() if rule.is_dense else CHOSEN
