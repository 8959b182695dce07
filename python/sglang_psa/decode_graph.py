"""Decode steps inside SGLang's CUDA graphs, and statistics that are fetched one step late.

SGLang calls the attention backend before a graph is captured, and before every replay; between a
replay's kernels nothing of Python runs. What a step read is copied to the host without waiting, and
looked at when SGLang handles the step's tokens, or when the next step has been launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sgl_psa.rule_table import RuleTable
from sgl_psa.static_plan import StaticPlanner
from sgl_psa.stats import StepStats
from sgl_psa.wrapper import PSADecodeWrapper
from sglang_psa.late_copy import LateCopy


class DecodeGraphs:
    """The steps of one attention backend that SGLang captures and replays."""

    def __init__(
        self,
        wrapper: PSADecodeWrapper,
        rules: RuleTable,
        req_to_token: torch.Tensor,
        max_batch: int,
        num_qo_heads: int,
    ) -> None:
        """
        Args:
            req_to_token: int32 [request slots, max context].
            num_qo_heads: of this tensor-parallel rank.

        Raises:
            ConfigError: the wrapper's settings cannot be captured.
        """
        self._rules = rules
        self._req_to_token = req_to_token
        self._planner = StaticPlanner(wrapper, max_batch, req_to_token.shape[1], num_qo_heads)
        self._replaying = False

    def plan(self, forward_batch: Any, capture: bool) -> None:
        """Plan a step that is captured, or replayed, next; nothing waits for the device.

        Args:
            forward_batch: SGLang's batch, or its view of the padded batch of a replay.
        """
        slots = forward_batch.req_pool_indices
        self._planner.plan(
            self._req_to_token,
            slots,
            forward_batch.seq_lens,
            self._rules.rows(slots),
            num_padding=getattr(forward_batch, "num_padding", 0),
            capture=capture,
        )
        self._replaying = not capture

    def finish(self) -> StepStats | None:
        """Close the step that was replayed; ``None`` if none was."""
        replayed, self._replaying = self._replaying, False
        return self._planner.finish() if replayed else None


class LateTable(Sequence[tuple[float, ...]]):
    """Rows of a table that is on its way to the host; the first look waits for it.

    On the CPU there is nothing to wait for.
    """

    def __init__(self, table: torch.Tensor) -> None:
        """
        Args:
            table: [rows, columns] on any device.
        """
        self._copy = LateCopy(table)
        self._rows: list[tuple[float, ...]] | None = None

    @property
    def rows(self) -> list[tuple[float, ...]]:
        """All rows."""
        if self._rows is None:
            self._rows = [tuple(row) for row in self._copy.get().tolist()]
        return self._rows

    def __len__(self) -> int:
        return self._copy.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


class LateSteps:
    """Hands a step of a CUDA device on when the next one comes, others at once."""

    def __init__(self) -> None:
        self._last: tuple[LateTable, torch.Size] | None = None

    def swap(self, step: StepStats) -> StepStats | None:
        """The newest step that is on the host; ``None`` if that is none."""
        if not step.table.is_cuda:
            return step
        sparse = torch.as_tensor(step.sparse_rows, device=step.table.device)
        flat = torch.cat([step.table.flatten(), sparse.double().view(1)])
        last, self._last = self._last, (LateTable(flat[:, None]), step.table.shape)
        if last is None:
            return None
        numbers = [row[0] for row in last[0].rows]
        table = torch.tensor(numbers[:-1], dtype=torch.float64).view(last[1])
        return StepStats(table, int(numbers[-1]))
