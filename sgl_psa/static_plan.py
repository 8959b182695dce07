"""Decode steps in buffers that never move, so that a CUDA graph can hold every layer's ``run``.

A graph replays kernels on the addresses and shapes that it was captured with, and nothing on the
host runs in between. So a step's page table, lengths and rules are written into buffers of the
largest batch and the longest context; every row may be sparse, and which are is known on the device
alone. What ``run`` leaves behind while it is captured (statistics, bytes read) lies at fixed
addresses too, and is read after each replay.

    planner.plan(..., capture=True)    # then run() of every layer, captured
    planner.plan(...)                  # then the graph's replay
    planner.finish()                   # the step's statistics, on the device
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_psa.backends import NEVER_WAITING
from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.decode_step import DecodePlan, StepRecord
from sgl_psa.policies import POLICIES
from sgl_psa.policies.base import Policy
from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers.base import PageBatch
from sgl_psa.stats import StepStats
from sgl_psa.wrapper import PSADecodeWrapper


def check_policy(policy: Policy, prefix: str = "") -> None:
    """Refuse a policy that chooses pages on the host's word.

    Args:
        prefix: of the field's name where it was given, ``psa_`` in a request.

    Raises:
        ConfigError: naming the policies that run.
    """
    if policy.select is not None:
        names = " or ".join(p.name for p in POLICIES.values() if p.select is None)
        raise ConfigError(
            f"{prefix}policy={policy.name!r}: it chooses pages outside of the decode CUDA graph; "
            f"use {prefix}policy {names}, or serve without decode CUDA graphs"
        )


def check(config: PSAConfig, backend: str) -> None:
    """Refuse settings whose steps cannot be captured.

    Args:
        backend: kernel backend, as in :class:`PSADecodeWrapper`.

    Raises:
        ConfigError: naming the setting to change.
    """
    if backend not in NEVER_WAITING:
        raise ConfigError(
            f"backend={backend!r}: its kernels wait for the device, which a CUDA graph cannot; "
            f"use backend {' or '.join(NEVER_WAITING)}"
        )
    check_policy(POLICIES[config.policy])
    if config.scorer == "exact":
        raise ConfigError("scorer='exact': its work depends on the data; use another scorer")
    if config.audit_rate:
        raise ConfigError(
            f"audit_rate={config.audit_rate:g}: audits run on the host's word; drop audit_rate"
        )


class _Rules(NamedTuple):
    """Buffers of :class:`RuleRows`, by its names; B is the largest batch."""

    mode: torch.Tensor
    threshold: torch.Tensor
    kappa_floor: torch.Tensor
    kappa_std: torch.Tensor
    scored: torch.Tensor
    weighted: torch.Tensor
    stops: torch.Tensor

    @classmethod
    def blank(cls, size: int, device: torch.device) -> _Rules:
        kinds = [torch.int32, *3 * [torch.float32], *3 * [torch.bool]]
        return cls(*(torch.zeros(size, dtype=kind, device=device) for kind in kinds))

    def put(self, rows: RuleRows, size: int) -> RuleRows:
        """``rows`` copied into the first ``size`` places; the views."""
        views = {name: buffer[:size] for name, buffer in self._asdict().items()}
        for name, view in views.items():
            view.copy_(getattr(rows, name))
        return RuleRows(**views, picks=(), generation=rows.generation)


class StaticPlanner:
    """Plans the steps of a wrapper in its own buffers; one a wrapper.

    Attributes:
        max_batch: rows of the largest step.
    """

    def __init__(
        self, wrapper: PSADecodeWrapper, max_batch: int, max_tokens: int, num_qo_heads: int
    ) -> None:
        """
        Args:
            max_tokens: of the longest context; longer ones must not be planned.
            num_qo_heads: of the queries that ``wrapper.run`` will be given.

        Raises:
            ConfigError: the wrapper's settings cannot be captured.
        """
        shape, device = wrapper.scorer.shape, wrapper.scorer.shape.device
        check(wrapper.config, wrapper.backend)
        self.wrapper = wrapper
        self.max_batch = max_batch
        pages = -(-max_tokens // shape.page_size)
        self._table = torch.zeros(max_batch, pages, dtype=torch.int32, device=device)
        self._lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._active = torch.zeros(max_batch, dtype=torch.uint8, device=device)
        self._rules = _Rules.blank(max_batch, device)
        self._records: dict[int, StepRecord] = {}
        self._first = self._kappa = self._sums = None
        if wrapper.predictor is not None:
            layers, options = shape.num_layers, {"device": device}
            heads = (layers, max_batch, num_qo_heads)
            self._first = torch.zeros(
                layers, max_batch, shape.num_kv_heads, dtype=torch.int32, **options
            )
            self._kappa = torch.zeros(heads, **options)
            self._sums = torch.zeros(*heads, 3, **options)

    def plan(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: RuleRows,
        *,
        num_padding: int = 0,
        capture: bool = False,
    ) -> DecodePlan:
        """Prepare a decode step, as :meth:`PSADecodeWrapper.plan`; nothing waits for the device.

        Args:
            num_padding: last rows of the batch that are no requests; their lengths do not count.
            capture: ``run`` follows, to be captured; else the replay of what was captured for a
                batch of this size.

        Raises:
            RuntimeError: the batch is larger than the buffers, or nothing was captured for it.
        """
        wrapper, size = self.wrapper, len(seq_lens)
        config, page_size = wrapper.config, wrapper.page_size
        if size > self.max_batch:
            raise RuntimeError(f"StaticPlanner: {size} rows, made for {self.max_batch}")
        if not capture and size not in self._records:
            raise RuntimeError(f"StaticPlanner: nothing was captured for {size} rows")
        wrapper.finish()
        heads = req_to_token[:, : self._table.shape[1] * page_size : page_size][req_pool_indices]
        table, lens, active = self._table[:size], self._lens[:size], self._active[:size]
        table[:, : heads.shape[1]].copy_(torch.div(heads, page_size, rounding_mode="floor"))
        lens.copy_(seq_lens)
        lens[size - num_padding :].zero_()
        sparse = (rows.mode != 0) & (lens >= wrapper.min_context) & (lens > 0)
        rows = rows._replace(mode=rows.mode * sparse, stops=rows.stops & sparse)
        active.copy_(sparse & rows.scored)
        if wrapper.predictor is not None:
            # Any row may have the coverage rule, as far as the host knows.
            rows = wrapper.predictor.plan(len(req_to_token), req_pool_indices, lens, rows, size)
            assert self._first is not None and self._kappa is not None and self._sums is not None
            wrapper.predictor.pin(
                self._first[:, :size], self._kappa[:, :size], self._sums[:, :size]
            )
        weighted = size if config.stop == "change" else 0
        plan = DecodePlan(
            PageBatch(table, lens, active), self._rules.put(rows, size), size, size, weighted, ()
        )
        record = wrapper.new_record(size) if capture else self._records[size]
        record.ran = not capture
        self._records[size] = record
        wrapper.adopt(plan._replace(sparse_rows=sparse.sum()), record)
        return plan

    def finish(self) -> StepStats | None:
        """Close the replayed step, as :meth:`PSADecodeWrapper.finish`."""
        return self.wrapper.finish()
