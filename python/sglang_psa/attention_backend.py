"""The psa attention backend: dense prefill, progressive sparse decode.

Prefill attends everything: the cached prefix and the new chunk are two exact parts. Decode reads
the pages that :class:`sgl_psa.wrapper.PSADecodeWrapper` selects. K is written through the pool
before attention, so the summaries are up to date when pages are scored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from sgl_psa_kernels.triton_support import interpreted

from sgl_psa import kernel_check
from sgl_psa.backends import NEVER_WAITING
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.stats import StepStats
from sgl_psa.wrapper import PSADecodeWrapper
from sglang_psa import defaults, graph_args, hooks, layers, prefix_budgets, state
from sglang_psa.compat import AttentionBackend
from sglang_psa.decode_graph import DecodeGraphs
from sglang_psa.kv_pool import PSAKVPool
from sglang_psa.prefill import Prefill
from sglang_psa.server_args import psa_config

logger = logging.getLogger(__name__)


class PSAAttentionBackend(AttentionBackend):
    """See the module; built once a tensor-parallel rank.

    Attributes:
        config: the server's settings.
        rules: rule of each slot of the request pool.
        wrapper: the decode loop; ``wrapper.stats`` are the totals since start.
        last_step: statistics of the newest finished decode step, rows in batch order.
    """

    def __init__(self, runner: Any) -> None:
        """
        Raises:
            HookNotApplied: SGLang did not take one of the hooks that psa relies on.
            KernelCheckError: the kernels for CUDA are wrong on this device, or do not run.
            PriorError: the budget prior cannot be used with this model.
            UnsupportedLayer: the model has attention that psa cannot run.
        """
        super().__init__()
        hooks.verify()
        if not isinstance(runner.token_to_kv_pool, PSAKVPool):
            raise hooks.HookNotApplied(
                f"the KV pool is {type(runner.token_to_kv_pool).__name__}, not PSAKVPool"
            )
        layers.check(runner.model)
        self._count_calls: Callable[[], Counter[str]] | None = None
        if runner.token_to_kv_pool.kernel_backend == "cpu" and defaults.on_psa_cpu_platform():
            from sglang_psa import cpu_layers, decoder_layer

            cpu_layers.install(runner.model)
            decoder_layer.install(runner.model)
            self._count_calls = decoder_layer.calls
        self.pool = runner.token_to_kv_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.config = psa_config(runner.server_args)
        self.rules = RuleTable(self.config, self.req_to_token.shape[0], self.pool.device)
        self.wrapper = PSADecodeWrapper(
            self.config,
            self.pool.scorer,
            backend=self.pool.kernel_backend,
            kv_element_bytes=self.pool.store_dtype.itemsize,
            prior=prefix_budgets.load_prior(self.config, self.pool, runner),
            values=self.pool.summaries.values,
            tier=self.pool.tier,
        )
        self.last_step: StepStats | None = None
        self.graphs: DecodeGraphs | None = None
        self._num_qo_heads = layers.query_heads(runner.model)
        if self.wrapper.backend in NEVER_WAITING and not interpreted():
            graphs = graph_args.decode_graph(runner.server_args) != "disabled"
            kernel_check.check_kernels(
                self.config,
                self.pool.scorer.shape,
                backend=self.wrapper.backend,
                dtype=self.pool.dtype,
                num_qo_heads=self._num_qo_heads,
                make_graph=kernel_check.cuda_graph if graphs else None,
            )
        self.prefill = Prefill(self.pool, self.req_to_token)
        self._layers_left = 0
        self._announced = False
        state.set_backend(self)
        logger.info(
            "psa backend ready: kernels=%s page_size=%d sparse from %d tokens on, %s",
            self.pool.kernel_backend,
            self.pool.page_size,
            self.wrapper.min_context,
            self.config.as_dict(),
        )

    @property
    def layer_calls(self) -> Counter[str] | None:
        """Calls of the CPU layers by what ran; ``None`` where the model keeps SGLang's."""
        return None if self._count_calls is None else self._count_calls()

    def parse_rule(self, params: dict[str, Any] | None) -> RequestRule:
        """The rule a request asks for; raises ``ConfigError`` for one that cannot be used."""
        return RequestRule.parse(params, self.config)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the step: page tables and rules for decode, prefix pages for prefill."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            slots = forward_batch.req_pool_indices
            self.wrapper.plan(
                self.req_to_token, slots, forward_batch.seq_lens, self.rules.rows(slots)
            )
            self._layers_left = self.pool.layer_num
        elif not mode.is_idle():
            self.prefill.plan(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate the buffers of decode steps in CUDA graphs."""
        self.graphs = DecodeGraphs(
            self.wrapper, self.rules, self.req_to_token, max_bs, self._num_qo_heads
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padding rows while a graph is captured; replays take them for no rows."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a decode step whose layers run inside a CUDA graph."""
        assert self.graphs is not None, "init_cuda_graph_state comes first"
        self.last_step = None  # SGLang's warm-up, whose statistics nobody fetched.
        self.graphs.plan(forward_batch, in_capture)
        self._layers_left = -1  # The last layer does not close the step: it may only be captured.

    def take_step(self) -> StepStats | None:
        """Statistics of the decode step of the newest forward pass, ``None`` if it was none."""
        replayed = None if self.graphs is None else self.graphs.finish()
        step, self.last_step = self.last_step, None
        return step if replayed is None else replayed

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Dense causal attention of the new tokens, [tokens, Hq * D]."""
        self._write(k, v, layer, forward_batch, save_kv_cache, kwargs)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.head_dim)
        out = self.prefill.attend(layer.layer_id, q, k, v, layer.scaling)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Progressive sparse attention of one token a request, [B, Hq * D]."""
        self._write(k, v, layer, forward_batch, save_kv_cache, kwargs)
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        k_cache, v_cache = self.pool.decode_buffers(layer.layer_id)
        index = layer.layer_id - self.pool.start_layer
        out, _ = self.wrapper.run(index, q, k_cache, v_cache, layer.scaling)
        self._layers_left -= 1
        if self._layers_left == 0:
            self._finish_step()
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _write(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        extras: dict[str, Any],
    ) -> None:
        given = [name for name, value in extras.items() if value is not None]
        if given or k is None or v is None:
            what = ", ".join(given) or "layers that share another layer's KV"
            raise layers.UnsupportedLayer(f"layer {layer.layer_id}: psa does not support {what}")
        if save_kv_cache:
            self.pool.write(layer, forward_batch.out_cache_loc, k, v)

    def _finish_step(self) -> None:
        self.last_step = self.wrapper.finish()
        if not self._announced and self.wrapper.stats.sparse_rows:
            self._announced = True
            total = self.wrapper.stats.total()
            logger.info(
                "PSA decoded %d tokens, read %.1f %% of the KV bytes that dense attention reads "
                "(%d of %d pages)",
                self.wrapper.stats.sparse_rows,
                100.0 * total.bytes_read / max(total.bytes_dense, 1),
                total.pages_attended,
                total.pages_total,
            )

    def support_triton(self) -> bool:
        """Whether SGLang may use its Triton helpers around this backend."""
        return torch.device(self.pool.device).type != "cpu"
