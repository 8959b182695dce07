"""Dense prefill attention: every request's chunk over its cached prefix and over itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sgl_psa_kernels import prefill_attention
from torch.nn.attention.bias import causal_lower_right

from sgl_psa.backends import around
from sglang_psa.kv_pool import PSAKVPool

#: (q [S, Hq, D], k_prefix, v_prefix [Lp, Hkv, D] | None, k, v [S, Hkv, D], sm_scale) -> [S, Hq, D]
Attention = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, float],
    torch.Tensor,
]


class Chunk(NamedTuple):
    """One request's part of a prefill batch: rows ``start:stop`` of the batch's tokens.

    Attributes:
        prefix_len: tokens of the request that are in the pool already.
        pages: int64, theirs; ``None`` without a prefix.
    """

    start: int
    stop: int
    prefix_len: int
    pages: torch.Tensor | None


class Rows(NamedTuple):
    """New rows of a chunk: q [S, Hq, D], k and v [S, Hkv, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sm_scale: float


class Prefill:
    """The chunks of the batch that is being prefilled, over a pool.

    On CPUs a pool of two tiers hands the prefix of one layer and request out block by block, so
    what is needed at a time is one block's room, however long prompts are and wherever their pages
    lie. On other devices attention takes a prefix whole: it is gathered into one buffer, made at
    the start, with room for K and V of the longest request in one layer (2 * tokens * Hkv * D
    elements).
    """

    def __init__(self, pool: PSAKVPool, req_to_token: torch.Tensor) -> None:
        """
        Args:
            req_to_token: int32 [request slots, max context], KV slot of each token.
        """
        self.pool = pool
        self.req_to_token = req_to_token
        self.backend = kernels(pool.kernel_backend)
        self._attention = choose(pool.kernel_backend, pool.device)
        self._chunks: list[Chunk] = []
        self._attend: Callable[[int, Chunk, Rows], torch.Tensor] = self._from_buffers
        if pool.tier is not None and self._attention is fused:
            pool.tier.reserve(min(req_to_token.shape[1], pool.size))
            self._attend = self._from_tier
        elif pool.tier is not None:
            self._attend = self._from_blocks

    def plan(self, forward_batch: Any) -> None:
        """Find the chunks of a batch and the pages of their prefixes."""
        size, start, chunks = self.pool.page_size, 0, []
        for slot, prefix_len, new in zip(
            forward_batch.req_pool_indices.tolist(),
            _host_list(forward_batch.extend_prefix_lens_cpu),
            _host_list(forward_batch.extend_seq_lens_cpu),
            strict=True,
        ):
            first_slots = self.req_to_token[slot, :prefix_len:size].long()
            pages = torch.div(first_slots, size, rounding_mode="floor") if prefix_len else None
            chunks.append(Chunk(start, start + new, prefix_len, pages))
            start += new
        self._chunks = chunks

    def attend(
        self, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        """Causal attention of the planned batch in one layer.

        Args:
            q: [tokens, Hq, D]; padding rows may follow the last chunk.
            k, v: [tokens, Hkv, D], of the new tokens.

        Returns:
            [tokens, Hq, D], padding rows 0.
        """
        out = torch.empty_like(q)
        used = 0
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.stop)
            new = Rows(q[rows], k[rows], v[rows], sm_scale)
            out[rows] = self._attend(layer_id, chunk, new)
            used = chunk.stop
        out[used:].zero_()
        return out

    def _from_buffers(self, layer_id: int, chunk: Chunk, new: Rows) -> torch.Tensor:
        q, k, v, sm_scale = new
        k_prefix = v_prefix = None
        if chunk.pages is not None:
            k_prefix, v_prefix = (
                buffer.view(-1, self.pool.page_size, *buffer.shape[1:])[chunk.pages].flatten(0, 1)[
                    : chunk.prefix_len
                ]
                for buffer in self.pool.get_kv_buffer(layer_id)
            )
        return self._attention(q, k_prefix, v_prefix, k, v, sm_scale)

    def _from_tier(self, layer_id: int, chunk: Chunk, new: Rows) -> torch.Tensor:
        q, k, v, sm_scale = new
        assert self.pool.tier is not None
        if chunk.pages is not None:
            index = layer_id - self.pool.start_layer
            k, v = self.pool.tier.prefix_and_rows(index, chunk.pages, chunk.prefix_len, k, v)
        return self._attention(q, None, None, k, v, sm_scale)

    def _from_blocks(self, layer_id: int, chunk: Chunk, new: Rows) -> torch.Tensor:
        q, k, v, sm_scale = new
        assert self.pool.tier is not None
        blocks: Any = ()
        if chunk.pages is not None:
            index = layer_id - self.pool.start_layer
            blocks = self.pool.tier.prefix_blocks(
                index, chunk.pages, chunk.prefix_len, prefill_attention.BLOCK_TOKENS
            )
        out, _ = prefill_attention.prefill_blocks(
            q, blocks, k, v, sm_scale=sm_scale, backend=self.backend
        )
        return out


def kernels(kernel_backend: str) -> str:
    """Implementation of prefill attention on CPUs, for the kernels that serve the pool."""
    name = around(kernel_backend)
    return "torch" if name == "triton" else name


def choose(kernel_backend: str, device: torch.device | str) -> Attention:
    """The function for ``device``: two exact parts on CPU, torch's fused attention elsewhere."""
    if torch.device(device).type != "cpu":
        return fused
    return functools.partial(two_parts, backend=kernels(kernel_backend))


def two_parts(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    *,
    backend: str,
) -> torch.Tensor:
    """Prefix and causal chunk apart, merged by log-sum-exp."""
    out, _ = prefill_attention.prefill(
        q, k_prefix, v_prefix, k, v, sm_scale=sm_scale, backend=backend
    )
    return out


def fused(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """One call of torch's scaled dot product attention, causal from the lower right corner."""
    if k_prefix is not None and v_prefix is not None:
        k, v = torch.cat([k_prefix, k]), torch.cat([v_prefix, v])
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=causal_lower_right(q.shape[2], k.shape[2]),
        scale=sm_scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)


def _host_list(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)
