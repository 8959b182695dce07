"""Decode steps of captured contexts through the wrapper, audited, under several settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgl_psa.audit.auditor import Auditor, AuditSample
from sgl_psa.audit.capture import LayerTensors
from sgl_psa.audit.settings import Setting
from sgl_psa.backends import resolve_backend
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.stats import PAGES
from sgl_psa.summaries import Summaries, make_summaries
from sgl_psa.wrapper import PSADecodeWrapper


@dataclass
class Measured:
    """Audited rows of one setting, one tensor a (layer, step), float32 [rows].

    ``claimed`` holds the kernel's estimate of the coverage. ``pages`` and ``pages_total``, and
    ``bytes_read`` and ``bytes_dense``, count what was read; ``pages_by_step`` has the pages
    attended, float32 [contexts, Hkv], one a layer and step in the order of the steps.
    """

    coverage: list[torch.Tensor] = field(default_factory=list)
    claimed: list[torch.Tensor] = field(default_factory=list)
    error: list[torch.Tensor] = field(default_factory=list)
    pages: int = 0
    pages_total: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    pages_by_step: list[torch.Tensor] = field(default_factory=list)


class _Keeper(Auditor):
    """Audits everything and keeps the rows."""

    def __init__(self, wrapper: PSADecodeWrapper, kept: Measured) -> None:
        layers = wrapper.scorer.shape.num_layers
        super().__init__(layers, 1.0, page_size=wrapper.page_size, backend=wrapper.backend)
        self.kept = kept

    def observe(self, layer: int, *args: Any) -> None:
        columns = args[5]
        self.kept.pages_by_step.append(columns[..., PAGES].clone())
        super().observe(layer, *args)

    def record(self, layer: int, sample: AuditSample) -> None:
        self.kept.coverage.append(sample.coverage[sample.valid].flatten())
        self.kept.claimed.append(sample.claimed[sample.valid].flatten())
        self.kept.error.append(sample.error[sample.valid].flatten())


class Replay:
    """The paged cache of several contexts of one length, filled up to the first decode step.

    All contexts decode together: row b of every step is context b. K and V are stored in bfloat16,
    as a server stores them.
    """

    def __init__(self, contexts: Sequence[Sequence[LayerTensors]], page_size: int) -> None:
        """
        Args:
            contexts: per context, its layers; all of the same shapes.
        """
        first = contexts[0][0]
        self.contexts = contexts
        self.page_size = page_size
        self.steps = first.q.shape[1]
        self.length = first.k.shape[1]
        kv_heads, dim = first.k.shape[0], first.k.shape[2]
        pages = -(-self.length // page_size)
        shape = (len(contexts), pages * page_size, kv_heads, dim)
        self.k, self.v = [], []
        for layer in range(len(contexts[0])):
            k, v = (
                torch.zeros(shape, dtype=torch.bfloat16),
                torch.zeros(shape, dtype=torch.bfloat16),
            )
            for b, context in enumerate(contexts):
                k[b, : self.length] = context[layer].k.transpose(0, 1)
                v[b, : self.length] = context[layer].v.transpose(0, 1)
            self.k.append(k.flatten(0, 1))
            self.v.append(v.flatten(0, 1))
        slots = torch.arange(shape[0] * shape[1], dtype=torch.int32)
        self.req_to_token = slots.view(shape[0], -1)
        self.cache_shape = CacheShape(
            len(self.k), shape[0] * pages, page_size, kv_heads, dim, torch.device("cpu")
        )

    def measure(self, settings: Sequence[Setting]) -> list[Measured]:
        """Decode every position under every setting; the settings share one set of summaries.

        Raises:
            ValueError: the settings differ in scorer.
        """
        configs = [setting.config for setting in settings]
        if len({(c.scorer, c.sketch_bits, c.summary_bits) for c in configs}) != 1:
            raise ValueError("Replay.measure: all settings must name the same scorer")
        backend = resolve_backend(configs[0].backend, "cpu")
        summaries = make_summaries(
            configs[0],
            self.cache_shape,
            backend,
            means=any(c.compensate for c in configs),
            norms=any(c.stop == "change" for c in configs),
        )
        prompt = self.length - self.steps
        self._write(summaries, 0, prompt)
        results = [Measured() for _ in configs]
        wrappers = []
        for config, kept in zip(configs, results, strict=True):
            wrapper = PSADecodeWrapper(
                config,
                summaries.scorer,
                backend=backend,
                kv_element_bytes=2,
                values=summaries.values,
            )
            wrapper.audit = _Keeper(wrapper, kept)
            wrappers.append(wrapper)
        for step in range(self.steps):
            self._write(summaries, prompt + step, prompt + step + 1)
            for wrapper, setting in zip(wrappers, settings, strict=True):
                self._step(wrapper, setting, step)
        for wrapper, kept in zip(wrappers, results, strict=True):
            total = wrapper.stats.total()
            kept.pages, kept.pages_total = total.pages_attended, total.pages_total
            kept.bytes_read, kept.bytes_dense = total.bytes_read, total.bytes_dense
        return results

    def _write(self, summaries: Summaries, start: int, stop: int) -> None:
        slots = self.req_to_token[:, start:stop].flatten().long()
        for layer, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            summaries.on_write(layer, slots, k, v)

    def _step(self, wrapper: PSADecodeWrapper, setting: Setting, step: int) -> None:
        batch = len(self.contexts)
        slots = torch.arange(batch)
        lens = torch.full((batch,), self.length - self.steps + step + 1)
        table = RuleTable(wrapper.config, batch, "cpu")
        wrapper.plan(self.req_to_token, slots, lens, setting.rows(table.rows(slots)))
        for layer in range(len(self.k)):
            tensors = [context[layer] for context in self.contexts]
            q = torch.stack([t.q[:, step] for t in tensors]).bfloat16()
            wrapper.run(layer, q, self.k[layer], self.v[layer], tensors[0].sm_scale)
        wrapper.finish()
