"""Dense decode attention of others over a paged pool; each returns a step that can be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmark.gpu.pool import Pool

#: Parts that SGLang's Triton kernel cuts a row into: its default is 8, the most it takes 16.
SGLANG_SPLITS = 16

Step = Callable[[], Any]


def by_page(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [pages, page, Hkv, D]."""
    return pool.k.unflatten(0, (-1, pool.page)), pool.v.unflatten(0, (-1, pool.page))


def sdpa(pool: Pool) -> Step:
    """torch's attention on a contiguous copy: no pages to follow."""
    slots = torch.stack([pool.slots(row) for row in range(pool.batch)])
    k, v = (t[slots].transpose(1, 2).contiguous() for t in (pool.k, pool.v))
    q = pool.q[:, :, None]
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(q, k, v, scale=pool.scale, enable_gqa=True)[:, :, 0]


def flashinfer(pool: Pool) -> Step:
    """FlashInfer's paged decode, planned once."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device, pages = pool.q.device, pool.page_table.shape[1]
    workspace = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(pool.batch + 1, dtype=torch.int32, device=device) * pages,
        pool.page_table.flatten(),
        torch.full((pool.batch,), pool.page, dtype=torch.int32, device=device),
        pool.q.shape[1],
        pool.num_kv,
        pool.q.shape[2],
        pool.page,
        q_data_type=pool.q.dtype,
        kv_data_type=pool.k.dtype,
        sm_scale=pool.scale,
    )
    cache = by_page(pool)
    return lambda: wrapper.run(pool.q, cache)


def fa3(pool: Pool) -> Step:
    """FlashAttention 3 as SGLang ships it."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    k, v = by_page(pool)
    q = pool.q[:, None].contiguous()
    return lambda: flash_attn_with_kvcache(
        q,
        k,
        v,
        page_table=pool.page_table,
        cache_seqlens=pool.seq_lens,
        softmax_scale=pool.scale,
        causal=True,
    )[:, 0]


def sglang_triton(pool: Pool) -> Step:
    """The kernel of SGLang's Triton backend."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    device, heads, dim = pool.q.device, *pool.q.shape[1:]
    slots = torch.cat([pool.slots(row) for row in range(pool.batch)]).to(torch.int32)
    ends = pool.seq_lens.cumsum(0, dtype=torch.int32)
    starts = torch.nn.functional.pad(ends, (1, 0))
    size = (pool.batch, heads, SGLANG_SPLITS)
    logits = torch.empty(*size, dim, device=device)
    lse = torch.empty(size, device=device)
    splits = torch.full((pool.batch,), SGLANG_SPLITS, dtype=torch.int32, device=device)
    q, out = pool.q.contiguous(), torch.empty_like(pool.q)
    rest = (starts, slots, logits, lse, splits, SGLANG_SPLITS, pool.scale, 1.0, 1.0)

    def step() -> torch.Tensor:
        decode_attention_fwd(q, pool.k, pool.v, out, *rest)
        return out

    return step


PEERS: dict[str, Callable[[Pool], Step]] = {
    "sdpa dense": sdpa,
    "flashinfer dense": flashinfer,
    "fa3 dense": fa3,
    "sglang triton dense": sglang_triton,
}
