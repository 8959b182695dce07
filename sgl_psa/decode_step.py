"""A decode step: what is planned once for all of its layers, and what these leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers.base import PageBatch, ScoredStep
from sgl_psa.selector import Selection


class Parts(NamedTuple):
    """What the rules and lengths of a batch make of its rows.

    Attributes:
        given: the rules; sparse: which rows do not take the dense pass, of the long ones.
        long: rows of at least the least context.
        rows: the rules, mode 0 and no stop rule where a row is dense.
        active: uint8 [B], rows that want scores.
        counts: sparse rows, scored, weighted, and under the coverage rule.
    """

    given: RuleRows
    long: list[bool]
    sparse: torch.Tensor
    rows: RuleRows
    active: torch.Tensor
    counts: tuple[int, int, int, int]


class DecodePlan(NamedTuple):
    """One decode step, the same for every layer.

    Attributes:
        sparse_rows, scored_rows: how many rows do not take the dense pass, and how many of these
            have their pages scored.
        weighted_rows: how many of the scored rows have their estimates weighted by value norms.
        selections: rows whose policies choose their pages outright.
    """

    batch: PageBatch
    rows: RuleRows
    sparse_rows: int | torch.Tensor
    scored_rows: int
    weighted_rows: int
    selections: tuple[Selection, ...]


@dataclass
class StepRecord:
    """What the layers of a step left behind.

    Attributes:
        columns: the kernels' statistics, float32 [L, B, Hkv, NUM_COLUMNS]; 0 where nothing ran.
        layers: those that ran.
        scored: the scorer's step, from which it tells what it read; ``None`` if nothing was scored.
        value_bytes: bytes read of value means and norms, float32 [B, Hkv]; of layers that tell.
        ran: whether the step ran, and was not merely captured.
    """

    columns: torch.Tensor
    layers: set[int] = field(default_factory=set)
    scored: ScoredStep | None = None
    value_bytes: dict[int, torch.Tensor] = field(default_factory=dict)
    ran: bool = True
