"""PSADecodeWrapper: sparse paged decode attention behind FlashInfer's plan/run interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sgl_psa_kernels.progressive_decode import progressive_decode
from sgl_psa_kernels.progressive_decode.prepared import PreparedDecode

from sgl_psa.audit import Auditor
from sgl_psa.budget import BudgetPrior
from sgl_psa.config import PSAConfig
from sgl_psa.crossover import min_context
from sgl_psa.decode_step import DecodePlan, Parts, StepRecord
from sgl_psa.groups import group_percent
from sgl_psa.memory import legal as memory
from sgl_psa.page_values import PageValues
from sgl_psa.prediction import Predictor
from sgl_psa.row import COVERAGE
from sgl_psa.rule_table import RuleRows
from sgl_psa.scorers import Scorer
from sgl_psa.scorers.base import PageBatch
from sgl_psa.selector import Selector
from sgl_psa.stats import NUM_COLUMNS, ROUNDS, ByteCost, PSAStats, StepStats, step_stats

if TYPE_CHECKING:
    from sgl_psa.memory.tiered_cache import TieredCache


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
        tier: TieredCache | None = None,
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
            tier: where K and V are if not in one cache; ``run`` then takes none.

        Raises:
            ConfigError: ``config`` reads K or V in a way that ``tier`` does not serve.
            PriorError: ``config.budget_prior`` cannot be used.
            ValueError: ``config.compensate`` without means of the values.
        """
        if tier is not None:
            memory.check_readers(config)
        self.tier = tier
        means, norms = (values.means, values.norms) if values else (None, None)
        if config.compensate and means is None:
            raise ValueError("PSADecodeWrapper: compensate=true needs the cache's value means")
        self.values = PageValues(means if config.compensate else None, norms)
        self.config = config
        self.min_context = min_context(config, backend)
        self.group_percent = group_percent(config, backend)
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
        self._record: StepRecord | None = None
        self._prepared: PreparedDecode | None = None
        self._prepared_plan: DecodePlan | None = None  # whose rows it has
        self._parts: Parts | None = None
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
        if self.tier is not None:
            self.tier.begin_step()
        seq_lens = seq_lens.to(torch.int32)
        lens = seq_lens.tolist()
        longest = max(lens, default=0)
        heads = req_to_token[req_pool_indices, : max(longest, 1) : self.page_size]
        page_table = torch.div(heads, self.page_size, rounding_mode="floor").to(torch.int32)
        parts = self._divide(rows, [n > 0 and n >= self.min_context for n in lens])
        rows, sparse = parts.rows, parts.sparse
        batch = PageBatch(page_table.contiguous(), seq_lens, parts.active)
        sparse_rows, scored_rows, weighted_rows, coverage_rows = parts.counts
        if weighted_rows and self.values.norms is None:
            raise ValueError("PSADecodeWrapper: stop rule change needs the cache's value norms")
        selections = self._selector.plan(rows.picks, sparse, batch)
        if self.predictor is not None:
            rows = self.predictor.plan(
                req_to_token.shape[0], req_pool_indices, seq_lens, rows, coverage_rows
            )
        self._plan = DecodePlan(batch, rows, sparse_rows, scored_rows, weighted_rows, selections)
        self._record = self.new_record(len(seq_lens))
        return self._plan

    def _divide(self, rows: RuleRows, long: list[bool]) -> Parts:
        """The parts of a batch; those of the last one if nothing changed since."""
        kept = self._parts
        if kept is not None and kept.given is rows and kept.long == long:
            return kept
        sparse = (rows.mode != 0) & torch.tensor(long, dtype=torch.bool, device=rows.mode.device)
        scored = sparse & rows.scored
        used = rows._replace(mode=rows.mode * sparse, stops=rows.stops & sparse)
        flags = [sparse, scored, rows.weighted & scored, used.mode == COVERAGE]
        counts = torch.stack([f.sum() for f in flags]).tolist()
        parts = Parts(rows, long, sparse, used, scored.to(torch.uint8), tuple(counts))
        self._parts = parts
        return parts

    def new_record(self, rows: int) -> StepRecord:
        """An empty record of a step of a batch of ``rows``."""
        cache = self.scorer.shape
        shape = (cache.num_layers, rows, cache.num_kv_heads, NUM_COLUMNS)
        return StepRecord(torch.zeros(shape, device=cache.device))

    def adopt(self, plan: DecodePlan, record: StepRecord) -> None:
        """Open a step that was planned elsewhere, whose ``run`` writes, or has written, to
        ``record`` (:mod:`sgl_psa.static_plan`)."""
        self._plan, self._record = plan, record

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        sm_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned step in one layer.

        Args:
            layer: index of the layer in the scorer's cache.
            q: [B, Hq, D], after rotary embedding.
            k_cache, v_cache: [slots, Hkv, D]; the current token's rows already stored. ``None``
                with a tier.
            sm_scale: factor on q.k.

        Returns:
            The output [B, Hq, D] in q's dtype, and the log-sum-exp of what was attended, float32
            [B, Hq].

        Raises:
            RuntimeError: ``plan`` was not called for this step.
        """
        if self._plan is None or self._record is None:
            raise RuntimeError("PSADecodeWrapper.run() needs plan() first")
        plan, batch, record = self._plan, self._plan.batch, self._record
        log_mass = estimates = self._score(layer, q, plan, record, sm_scale)
        attended = None
        if log_mass is not None and self.values.take_part(plan):
            shape = (len(q), self.scorer.shape.num_kv_heads, batch.page_table.shape[1])
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
        record.layers.add(layer)
        if choices:
            columns = record.columns[layer]
            self._selector.account(layer, choices, columns, q, k_cache, lse, batch, sm_scale)
        if attended is not None and estimates is not None:
            out, record.value_bytes[layer] = self.values.complete(
                layer, out, lse, estimates, attended, record.columns[layer], plan
            )
        if self.audit is not None:
            assert k_cache is not None and v_cache is not None
            columns = record.columns[layer]
            self.audit.observe(layer, q, k_cache, v_cache, out, lse, columns, plan, sm_scale)
        return out, lse

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        log_mass: torch.Tensor | None,
        sm_scale: float,
        first_pages: torch.Tensor | None,
        attended: torch.Tensor | None,
        kappa_start: torch.Tensor | None,
        residuals: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of a layer; its statistics go to the step's record.

        The first call checks the arguments. Those after it, if alike, need no checks.
        """
        assert self._plan is not None and self._record is not None
        columns = self._record.columns
        options: dict[str, Any] = {
            "sm_scale": sm_scale,
            "first_pages": first_pages,
            "attended": attended,
            "kappa_start": kappa_start,
            "residuals": residuals,
        }
        batch, rows, config = self._plan.batch, self._plan.rows, self.config
        of_rows = {
            "page_table": batch.page_table,
            "seq_lens": batch.seq_lens,
            "mode": rows.mode,
            "threshold": rows.threshold,
            "kappa_floor": rows.kappa_floor,
            "kappa_std": rows.kappa_std,
        }
        if self._prepared is not None:
            assert k_cache is not None and v_cache is not None
            if self._prepared.serves(q, k_cache, v_cache):
                if self._prepared_plan is not self._plan:
                    self._prepared.take_batch(**of_rows)
                    self._prepared_plan = self._plan
                return self._prepared(q, k_cache, v_cache, log_mass, columns, layer, **options)
        forced: dict[str, Any] = {
            "sink_pages": config.sink_pages,
            "recent_pages": config.recent_pages,
            "group_pages": config.group_pages,
            "group_percent": self.group_percent,
        }
        options |= {**forced, **of_rows, "log_mass": log_mass}
        if self.tier is not None:
            return self.tier.decode(layer, q, **options, stats=columns[layer])[:2]
        assert k_cache is not None and v_cache is not None
        out, lse, columns[layer] = progressive_decode(
            q, k_cache, v_cache, page_size=self.page_size, backend=self.backend, **options
        )
        if self.backend == "cpu":
            self._prepared = PreparedDecode(
                q,
                k_cache,
                v_cache,
                **of_rows,
                page_size=self.page_size,
                **forced,
            )
            self._prepared_plan = self._plan
        return out, lse

    def _score(
        self, layer: int, q: torch.Tensor, plan: DecodePlan, record: StepRecord, sm_scale: float
    ) -> torch.Tensor | None:
        """Log masses float32 [B, Hq, max_pages]; ``None`` if every row is dense."""
        if not plan.scored_rows:
            shape = (*q.shape[:2], plan.batch.page_table.shape[1])
            return torch.zeros(shape, device=q.device) if plan.sparse_rows else None
        log_mass = self.scorer.score(layer, q, plan.batch, sm_scale)
        record.scored = self.scorer.step
        return log_mass

    def finish(self) -> StepStats | None:
        """Close the planned step: add it to ``stats`` and return it; ``None`` if nothing ran."""
        plan, record = self._plan, self._record
        self._plan = self._record = None
        if plan is None or record is None or not record.layers or not record.ran:
            return None
        # A step that left layers out says nothing about them.
        if self.predictor is not None and len(record.layers) == self.stats.num_layers:
            self.predictor.learn(record.columns[..., ROUNDS])
        step = step_stats(
            record.columns,
            plan.batch.seq_lens,
            plan.sparse_rows,
            self.page_size,
            self.cost,
            self._summary_bytes(plan, record),
            plan.rows.stops,
        )
        self.stats.add(step)
        return step

    def _summary_bytes(self, plan: DecodePlan, record: StepRecord) -> torch.Tensor | None:
        """Bytes read of what is kept of the pages in a step, float32 [L, B, Hkv]; ``None``: none
        were scored."""
        if not plan.scored_rows:
            return None
        read = self.scorer.read_bytes(slice(None), record.scored)
        if read is None:
            # Every page of a scored row has its summary read, those that are forced too.
            scored = plan.batch.pages_scored(self.page_size) * self.cost.scored_page
            read = scored.float()[:, None].expand(record.columns.shape[:3])
        if record.value_bytes:
            blank = torch.zeros_like(read[0])
            layers = range(len(record.columns))
            read = read + torch.stack([record.value_bytes.get(i, blank) for i in layers])
        return read

    def columns(self, layer: int) -> torch.Tensor:
        """What ``run`` read in ``layer`` of the open step, float32 [B, Hkv, NUM_COLUMNS]."""
        if self._record is None:
            raise RuntimeError("PSADecodeWrapper.columns() needs an open step")
        return self._record.columns[layer]
