"""PSADecodeWrapper: sparse paged decode attention behind FlashInfer's plan/run interface."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sgl_psa_kernels.progressive_decode import progressive_decode
from sgl_psa_kernels.progressive_decode.prepared import PreparedDecode

from sgl_psa.audit import Auditor
from sgl_psa.budget import BudgetPrior
from sgl_psa.config import PSAConfig
from sgl_psa.crossover import min_context
from sgl_psa.page_values import PageValues
from sgl_psa.prediction import Predictor
from sgl_psa.row import COVERAGE
from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers import Scorer
from sgl_psa.scorers.base import PageBatch
from sgl_psa.selector import Selection, Selector
from sgl_psa.stats import NUM_COLUMNS, ROUNDS, ByteCost, PSAStats, StepStats, step_stats


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
    sparse_rows: int
    scored_rows: int
    weighted_rows: int
    selections: tuple[Selection, ...]


class PSADecodeWrapper:
    """Decode attention over a paged KV cache that reads only the pages that matter.

    ``plan`` once per decode step, then ``run`` once per layer, in any order of layers. ``finish``
    closes the step and returns its statistics.
    """

    def __init__(
        self,
        config: PSAConfig,
        scorer: Scorer,
        *,
        backend: str,
        kv_element_bytes: int,
        prior: BudgetPrior | None = None,
        values: PageValues | None = None,
    ) -> None:
        """
        Args:
            scorer: holds the page summaries of the cache that ``run`` will be given.
            backend: kernel backend, from :func:`sgl_psa.backends.resolve_backend`.
            kv_element_bytes: size of one K or V element.
            prior: of these KV heads, where they are not all of the model; otherwise
                ``config.budget_prior`` is read.
            values: of the same cache, from :func:`sgl_psa.summaries.make_summaries`, where tail
                compensation or stop rule ``change`` need them.

        Raises:
            PriorError: ``config.budget_prior`` cannot be used.
            ValueError: ``config.compensate`` without means of the values.
        """
        means, norms = (values.means, values.norms) if values else (None, None)
        if config.compensate and means is None:
            raise ValueError("PSADecodeWrapper: compensate=true needs the cache's value means")
        self.values = PageValues(means if config.compensate else None, norms)
        self.config = config
        self.min_context = min_context(config, backend)
        self.scorer = scorer
        self.backend = backend
        self.page_size = scorer.shape.page_size
        self.cost = ByteCost(2 * scorer.shape.head_dim * kv_element_bytes, scorer.bytes_per_page)
        self.stats = PSAStats(scorer.shape.num_layers)
        self.audit: Auditor | None = None
        if config.audit_rate:
            self.audit = self.stats.audit = Auditor(
                scorer.shape.num_layers,
                config.audit_rate,
                page_size=self.page_size,
                backend=backend,
            )
        self.predictor: Predictor | None = None
        if config.predict:
            self.predictor = self.stats.predictor = Predictor(config, scorer.shape, prior)
        self._plan: DecodePlan | None = None
        self._prepared: PreparedDecode | None = None
        self._columns: torch.Tensor | None = None
        self._ran: set[int] = set()
        self._value_bytes: dict[int, torch.Tensor] = {}
        self._selector = Selector(config, scorer.shape)

    def plan(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        rows: RuleRows,
    ) -> DecodePlan:
        """Prepare a decode step.

        Args:
            req_to_token: int32 [request slots, max context], KV slot of each token; the first
                token of a page has a slot that is a multiple of the page size.
            req_pool_indices: int64 [B], row of ``req_to_token`` of each batch row.
            seq_lens: [B] integers, the current token included; 0 for padding rows.
            rows: rules, from :meth:`sgl_psa.rule_table.RuleTable.rows`.

        Raises:
            ValueError: a row has stop rule ``change`` and there are no value norms.
        """
        self.finish()
        seq_lens = seq_lens.to(torch.int32)
        longest = int(seq_lens.max()) if seq_lens.numel() else 0
        heads = req_to_token[req_pool_indices, : max(longest, 1) : self.page_size]
        page_table = torch.div(heads, self.page_size, rounding_mode="floor").to(torch.int32)
        sparse = (rows.mode != 0) & (seq_lens >= self.min_context) & (seq_lens > 0)
        rows = rows._replace(mode=torch.where(sparse, rows.mode, torch.zeros_like(rows.mode)))
        scored = sparse & rows.scored
        batch = PageBatch(page_table.contiguous(), seq_lens, scored.to(torch.uint8))
        weighted = rows.weighted & scored
        counts = [sparse, scored, weighted, rows.mode == COVERAGE]
        sparse_rows, scored_rows, weighted_rows, coverage_rows = torch.stack(
            [flags.sum() for flags in counts]
        ).tolist()
        if weighted_rows and self.values.norms is None:
            raise ValueError("PSADecodeWrapper: stop rule change needs the cache's value norms")
        selections = self._selector.plan(rows.picks, sparse, batch)
        if self.predictor is not None:
            rows = self.predictor.plan(
                req_to_token.shape[0], req_pool_indices, seq_lens, rows, coverage_rows
            )
        self._plan = DecodePlan(batch, rows, sparse_rows, scored_rows, weighted_rows, selections)
        shape = (self.stats.num_layers, len(seq_lens), self.scorer.shape.num_kv_heads, NUM_COLUMNS)
        self._columns = torch.zeros(shape, device=seq_lens.device)
        return self._plan

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        sm_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned step in one layer.

        Args:
            layer: index of the layer in the scorer's cache.
            q: [B, Hq, D], after rotary embedding.
            k_cache, v_cache: [slots, Hkv, D]; the current token's rows already stored.
            sm_scale: factor on q.k.

        Returns:
            The output [B, Hq, D] in q's dtype, and the log-sum-exp of what was attended, float32
            [B, Hq].

        Raises:
            RuntimeError: ``plan`` was not called for this step.
        """
        if self._plan is None or self._columns is None:
            raise RuntimeError("PSADecodeWrapper.run() needs plan() first")
        plan, batch = self._plan, self._plan.batch
        log_mass = estimates = self._score(layer, q, plan, sm_scale)
        attended = None
        if log_mass is not None and self.values.take_part(plan):
            shape = (len(q), k_cache.shape[1], batch.page_table.shape[1])
            attended = torch.empty(shape, dtype=torch.uint8, device=q.device)
            # The loop's copy: weighted, and the selector writes to it.
            log_mass = self.values.weigh(layer, log_mass, plan, self.scorer.watermark[layer])
        choices = []
        if log_mass is not None and plan.selections:
            choices = self._selector.choose(layer, plan.selections, log_mass)
        first_pages = kappa_start = residuals = None
        if self.predictor is not None and log_mass is not None:
            first_pages = self.predictor.first_pages(layer)
            kappa_start, residuals = self.predictor.correction(layer, q.shape[1])
        out, lse = self._attend(
            layer, q, k_cache, v_cache, log_mass, sm_scale, first_pages, attended, kappa_start,
            residuals,
        )  # fmt: skip
        self._ran.add(layer)
        if choices:
            columns = self._columns[layer]
            self._selector.account(layer, choices, columns, q, k_cache, lse, batch, sm_scale)
        if attended is not None and estimates is not None:
            out, self._value_bytes[layer] = self.values.complete(
                layer, out, lse, estimates, attended, self._columns[layer], plan
            )
        if self.audit is not None:
            columns = self._columns[layer]
            self.audit.observe(layer, q, k_cache, v_cache, out, lse, columns, plan, sm_scale)
        return out, lse

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        log_mass: torch.Tensor | None,
        sm_scale: float,
        first_pages: torch.Tensor | None,
        attended: torch.Tensor | None,
        kappa_start: torch.Tensor | None,
        residuals: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of a layer; its statistics go to ``_columns``.

        The first layer of a step checks the arguments. Those after it, if alike, need no checks.
        """
        assert self._plan is not None and self._columns is not None
        if self._prepared is not None and self._prepared.serves(q, k_cache, v_cache):
            return self._prepared(
                q,
                k_cache,
                v_cache,
                log_mass,
                self._columns,
                layer,
                sm_scale=sm_scale,
                first_pages=first_pages,
                attended=attended,
                kappa_start=kappa_start,
                residuals=residuals,
            )
        batch, rows, config = self._plan.batch, self._plan.rows, self.config
        out, lse, self._columns[layer] = progressive_decode(
            q,
            k_cache,
            v_cache,
            batch.page_table,
            batch.seq_lens,
            log_mass,
            rows.mode,
            rows.threshold,
            rows.kappa_floor,
            rows.kappa_std,
            page_size=self.page_size,
            sm_scale=sm_scale,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            group_pages=config.group_pages,
            backend=self.backend,
            first_pages=first_pages,
            attended=attended,
            kappa_start=kappa_start,
            residuals=residuals,
        )
        if self.backend == "cpu":
            self._prepared = PreparedDecode(
                q,
                k_cache,
                v_cache,
                batch.page_table,
                batch.seq_lens,
                rows.mode,
                rows.threshold,
                rows.kappa_floor,
                rows.kappa_std,
                page_size=self.page_size,
                sink_pages=config.sink_pages,
                recent_pages=config.recent_pages,
                group_pages=config.group_pages,
            )
        return out, lse

    def _score(
        self, layer: int, q: torch.Tensor, plan: DecodePlan, sm_scale: float
    ) -> torch.Tensor | None:
        """Log masses float32 [B, Hq, max_pages]; ``None`` if every row is dense."""
        if not plan.scored_rows:
            shape = (*q.shape[:2], plan.batch.page_table.shape[1])
            return torch.zeros(shape, device=q.device) if plan.sparse_rows else None
        return self.scorer.score(layer, q, plan.batch, sm_scale)

    def finish(self) -> StepStats | None:
        """Close the planned step: add it to ``stats`` and return it; ``None`` if nothing ran."""
        plan, columns, ran, values = self._plan, self._columns, self._ran, self._value_bytes
        self._plan = self._columns = self._prepared = None
        self._ran, self._value_bytes = set(), {}
        if plan is None or columns is None or not ran:
            return None
        # A step that left layers out says nothing about them.
        if self.predictor is not None and len(ran) == self.stats.num_layers:
            self.predictor.learn(columns[..., ROUNDS])
        step = step_stats(
            columns,
            plan.batch.seq_lens,
            plan.sparse_rows,
            self.page_size,
            self.cost,
            self._summary_bytes(plan, columns, values),
            plan.rows.stops & (plan.rows.mode != 0),
        )
        self.stats.add(step)
        return step

    def _summary_bytes(
        self, plan: DecodePlan, columns: torch.Tensor, values: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Bytes read of what is kept of the pages in a step, float32 [L, B, Hkv]."""
        read = self.scorer.read_bytes(slice(None)) if plan.scored_rows else None
        if read is None:
            # Every page of a scored row has its summary read, those that are forced too.
            scored = plan.batch.pages_scored(self.page_size) * self.cost.scored_page
            read = scored.float()[:, None].expand(columns.shape[:3])
        if values:
            blank = torch.zeros_like(read[0])
            read = read + torch.stack([values.get(i, blank) for i in range(len(columns))])
        return read

    def columns(self, layer: int) -> torch.Tensor:
        """What ``run`` read in ``layer`` of the open step, float32 [B, Hkv, NUM_COLUMNS]."""
        if self._columns is None:
            raise RuntimeError("PSADecodeWrapper.columns() needs an open step")
        return self._columns[layer]
