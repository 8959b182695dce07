"""A transformers model that prefills densely and decodes through PSADecodeWrapper.

One context is prefilled once into a paged pool. Rows then fork from it, each with pages of its own
for what it is fed, so any number of questions and policies answer on the same context in one
batch; when they are done their pages are free again. With an arena, decode attends through two
tiers; the pool then serves prefill and summaries only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from sgl_psa.backends import resolve_backend
from sgl_psa.config import AUTO, PSAConfig
from sgl_psa.evaluate import arena as two_tiers
from sgl_psa.evaluate.arena import Arena
from sgl_psa.evaluate.feeder import Feeder
from sgl_psa.memory.tiered_cache import TieredCache
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.stats import PAGES, ROUNDS, TOKENS
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper

ATTENTION_NAME = "sgl_psa_evaluate"
#: Tokens of a page unless a model asks for others.
PAGE_SIZE = 16
#: Tokens from which policies are measured sparse where min_context is auto, whatever is faster.
SPARSE_FROM = 1024

_active: ContextVar[PagedModel] = ContextVar("paged model")


@dataclass
class Row:
    """One decode row.

    Attributes:
        prefix: tokens of the prefilled context that the row continues.
        counts: float64 [L, fields of ReadCounts], sums over the row's steps.
        heads: float64 [L, H, 2], pages attended and rounds, sums over the row's steps; H heads
            select pages (``PagedModel.heads``).
        bytes_attended: of K and V, without those read to score; sum over steps, layers and heads.
        steps: decode steps.
        pages: pages that dense attention would have read, per layer and head.
    """

    feeder: Feeder
    rule: RequestRule
    prefix: int
    counts: torch.Tensor | float = 0.0
    heads: torch.Tensor | float = 0.0
    bytes_attended: float = 0.0
    steps: int = 0
    pages: int = 0


class Group:
    """Summaries and a wrapper: what policies of the same server settings share.

    Attributes:
        tier: K and V of this group, if they are on two tiers.
    """

    def __init__(
        self,
        config: PSAConfig,
        shape: CacheShape,
        rows: int,
        dtype: torch.dtype,
        arena: Arena | None,
    ) -> None:
        if config.min_context == AUTO:
            config = replace(config, min_context=SPARSE_FROM)
        backend = resolve_backend(config.backend, shape.device)
        self.tier: TieredCache | None = None
        if arena is not None:
            config = arena.settings(config, shape, dtype)
            self.tier = two_tiers.build(config, shape, dtype, backend)
        # Policies that share a group may have any stop rule; tiers do not serve change.
        self.summaries = make_summaries(config, shape, backend, norms=arena is None)
        self.wrapper = PSADecodeWrapper(
            config,
            self.summaries.scorer,
            backend=backend,
            kv_element_bytes=dtype.itemsize,
            values=self.summaries.values,
            tier=self.tier,
        )
        self.table = RuleTable(config, rows, shape.device)

    def on_write(
        self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Rows of K and V were stored at ``slots`` of the layer's caches [slots, Hkv, D]."""
        self.summaries.on_write(layer, slots, k_cache, v_cache)
        if self.tier is not None:
            self.tier.write(layer, slots, k_cache[slots], v_cache[slots])


@dataclass
class _Prefill:
    """An attention pass over the whole context."""

    slots: torch.Tensor


@dataclass
class _Step:
    """An attention pass over one new token of each row."""

    group: Group
    slots: torch.Tensor
    columns: dict[int, torch.Tensor] = field(default_factory=dict)


class PagedModel:
    """See the module. ``decode`` may be called any number of times after ``prefill``.

    Attributes:
        heads: heads that select pages, each with K and V of its own.
        repeats: query heads that read the same K and V but select apart: 1, or the group size of
            the model if ``share_heads`` is false. Dense attention reads for all of them once.
    """

    def __init__(
        self,
        model: Any,
        configs: Sequence[PSAConfig],
        *,
        max_context: int,
        max_rows: int,
        max_tail: int,
        page_size: int = PAGE_SIZE,
        share_heads: bool = True,
        arena: Arena | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model of transformers, loaded to its device.
            configs: one a group.
            max_context: most tokens that ``prefill`` takes.
            max_rows: most rows of a ``decode``.
            max_tail: most tokens that a row is fed.
            page_size: tokens of a page.
            share_heads: the query heads of a KV head attend the same pages, as a server has it;
                if not, K and V are repeated, so that every query head selects for itself.
            arena: decode attends over two tiers; CPU only.

        Raises:
            ConfigError: settings or sizes that do not go with the arena.
            ValueError: the model's attention is not what PSA serves.
        """
        refuse_unfit(model.config)
        self.model = model
        text = model.config.get_text_config()
        self.num_layers = text.num_hidden_layers
        self.repeats = 1 if share_heads else text.num_attention_heads // text.num_key_value_heads
        self.heads = text.num_key_value_heads * self.repeats
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        parameter = next(model.parameters())
        self.device = parameter.device
        self.max_rows = max_rows
        self.page_size = page_size
        self._tail_pages = -(-max_tail // page_size) + 1
        self._context_pages = -(-max_context // page_size)
        num_pages = 1 + self._context_pages + max_rows * self._tail_pages
        shape = CacheShape(self.num_layers, num_pages, page_size, self.heads, head_dim, self.device)
        size = (self.num_layers, num_pages * page_size, self.heads, head_dim)
        self.k = torch.zeros(size, dtype=parameter.dtype, device=self.device)
        self.v = torch.zeros_like(self.k)
        self.groups = [Group(config, shape, max_rows, parameter.dtype, arena) for config in configs]
        self._req_to_token = torch.zeros(
            max_rows,
            (self._context_pages + self._tail_pages) * page_size,
            dtype=torch.int32,
            device=self.device,
        )
        self._length = 0
        self._pass: _Prefill | _Step | None = None
        _register()
        model.set_attn_implementation(ATTENTION_NAME)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> None:
        """Dense attention over ``ids``; replaces what was prefilled before.

        Raises:
            ValueError: more tokens than the pool was made for.
        """
        if len(ids) > self._context_pages * self.page_size:
            raise ValueError(
                f"{len(ids)} tokens do not fit into {self._context_pages} pages of {self.page_size}"
            )
        self._length = len(ids)
        slots = self.page_size + torch.arange(len(ids), device=self.device)
        positions = torch.arange(len(ids), device=self.device)
        self._forward(torch.tensor([ids], device=self.device), positions[None], _Prefill(slots))

    @torch.inference_mode()
    def decode(self, group: Group, rows: Sequence[Row]) -> None:
        """Run rows of one group to their end; the statistics are left in the rows."""
        self._fork(group, rows)
        for slot, row in enumerate(rows):
            group.table.set(slot, row.rule)
        while True:
            fed = [(slot, row, row.feeder.next()) for slot, row in enumerate(rows)]
            live = [(slot, row, token) for slot, row, token in fed if token is not None]
            if not live:
                return
            self._step(group, live)

    def _step(self, group: Group, live: list[tuple[int, Row, int]]) -> None:
        index = torch.tensor([slot for slot, _, _ in live], device=self.device)
        positions = torch.tensor([row.prefix + row.steps for _, row, _ in live], device=self.device)
        tokens = torch.tensor([token for _, _, token in live], device=self.device)
        slots = self._req_to_token[index, positions].long()
        group.wrapper.plan(self._req_to_token, index, positions + 1, group.table.rows(index))
        step = _Step(group, slots)
        logits = self._forward(tokens[:, None], positions[:, None], step)
        columns = torch.stack([step.columns[i] for i in range(self.num_layers)])
        heads = columns[..., [PAGES, ROUNDS]].double()
        attended = (columns[..., TOKENS].double().sum((0, 2)) * group.wrapper.cost.token).tolist()
        statistics = group.wrapper.finish()
        assert statistics is not None
        for i, (_, row, _) in enumerate(live):
            row.counts = statistics.table[:, i] + row.counts
            row.heads = heads[:, i] + row.heads
            row.bytes_attended += attended[i]
            row.pages += (row.prefix + row.steps) // self.page_size + 1
            row.steps += 1
            row.feeder.take(logits[i, -1])

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, work: _Prefill | _Step
    ) -> torch.Tensor:
        self._pass = work
        token = _active.set(self)
        try:
            return self.model(
                input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
        finally:
            _active.reset(token)
            self._pass = None

    def _fork(self, group: Group, rows: Sequence[Row]) -> None:
        """Map the rows' contexts; the open page of each is copied to the row's first own page."""
        if len(rows) > self.max_rows:
            raise ValueError(f"{len(rows)} rows: the pool was made for {self.max_rows}")
        if group.tier is not None:
            tails = 1 + self._context_pages + torch.arange(self.max_rows * self._tail_pages)
            group.tier.release(tails)
        sources, targets = [], []
        for slot, row in enumerate(rows):
            if not 0 < row.prefix <= self._length:
                raise ValueError(f"a row continues {row.prefix} of {self._length} tokens")
            if row.feeder.longest() > (self._tail_pages - 1) * self.page_size:
                raise ValueError(f"a row is fed {row.feeder.longest()} tokens: raise max_tail")
            shared = row.prefix // self.page_size * self.page_size
            first = (1 + self._context_pages + slot * self._tail_pages) * self.page_size
            own = first + torch.arange(self._tail_pages * self.page_size, device=self.device)
            context = self.page_size + torch.arange(row.prefix, device=self.device)
            self._req_to_token[slot, :shared] = context[:shared].int()
            self._req_to_token[slot, shared : shared + len(own)] = own.int()
            sources.append(context[shared:])
            targets.append(own[: row.prefix - shared])
        source, target = torch.cat(sources), torch.cat(targets)
        for layer in range(self.num_layers):
            self.k[layer][target] = self.k[layer][source]
            self.v[layer][target] = self.v[layer][source]
            group.on_write(layer, target, self.k[layer], self.v[layer])

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One layer of the running pass.

        Args:
            q: [B, Hq, S, D], after rotary embedding; k, v: [B, Hkv, S, D].

        Returns:
            [B, S, Hq, D].
        """
        work = self._pass
        assert work is not None
        if self.repeats > 1:
            k, v = (x.repeat_interleave(self.repeats, 1) for x in (k, v))
        if isinstance(work, _Prefill):
            self.k[layer][work.slots] = k[0].transpose(0, 1)
            self.v[layer][work.slots] = v[0].transpose(0, 1)
            for group in self.groups:
                group.on_write(layer, work.slots, self.k[layer], self.v[layer])
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=shared
            )
            return out.transpose(1, 2)
        self.k[layer][work.slots] = k[:, :, 0]
        self.v[layer][work.slots] = v[:, :, 0]
        work.group.on_write(layer, work.slots, self.k[layer], self.v[layer])
        wrapper = work.group.wrapper
        resident = work.group.tier is None
        k_cache, v_cache = (self.k[layer], self.v[layer]) if resident else (None, None)
        out, _ = wrapper.run(layer, q[:, :, 0].contiguous(), k_cache, v_cache, scale)
        work.columns[layer] = wrapper.columns(layer)
        return out[:, None]


def refuse_unfit(config: Any) -> None:
    """Raise ``ValueError`` for attention that is not causal, dense and full in every layer."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}: "
            "PSA needs full attention in every layer"
        )
    if getattr(text, "num_key_value_heads", None) is None:
        raise ValueError(f"{config.model_type} has no KV heads of its own: PSA needs GQA or MHA")


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = {name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name)}
    if unknown:
        raise ValueError(f"PSA does not serve attention with {', '.join(sorted(unknown))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active.get().attend(module.layer_idx, query, key, value, scale), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
