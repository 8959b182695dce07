"""Two-part prefill attention with torch's flash attention for CPUs."""

import torch

from sgl_psa_kernels.merge_state.reference import merge_state
from sgl_psa_kernels.prefill_attention.blocks import Blocks
from sgl_psa_kernels.wide_products import MIN_ROWS, faster_in_float32

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def prefill(
    q: torch.Tensor,
    prefix: Blocks,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.prefill_attention.prefill`.

    16-bit input is computed in float32 where that is faster; parts are merged in float32.
    """
    if len(q) == 0:
        return torch.empty_like(q), torch.empty(q.shape[:2])
    by_head = q.unflatten(1, (k_chunk.shape[1], -1))
    out, lse = _causal(by_head, k_chunk, v_chunk, sm_scale)
    out = out.float()
    for k, v in prefix:
        part, part_lse = _all_seen(by_head, k, v, sm_scale)
        out, lse = merge_state(out, lse, part, part_lse)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:2]).float()


def _causal(
    by_head: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk over itself: out [S, Hkv, G, D] and lse [S, Hkv, G], one call per g of the group
    with the keys and values as they are."""
    by_head, k, v = _as_computed(by_head, k, v)
    out = torch.empty(by_head.shape, dtype=by_head.dtype)
    lse = torch.empty(by_head.shape[:3])
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    for g in range(by_head.shape[2]):
        queries = by_head[:, :, g].transpose(0, 1).unsqueeze(0)
        o, part = _flash(queries, k, v, 0.0, True, scale=sm_scale)
        out[:, :, g] = o[0].transpose(0, 1)
        lse[:, :, g] = part[0].T
    return out, lse


def _all_seen(
    by_head: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that every query sees: the G query heads of a KV head fold into its query rows, so that
    one call reads each key once for all of them."""
    by_head, k, v = _as_computed(by_head, k, v)
    new, num_kv_heads, group, dim = by_head.shape
    folded = by_head.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * new, dim)
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    o, part = _flash(folded, k, v, 0.0, False, scale=sm_scale)
    out = o[0].view(num_kv_heads, group, new, dim).permute(2, 0, 1, 3)
    return out, part[0].reshape(num_kv_heads, group, new).permute(2, 0, 1)


def _as_computed(by_head: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """In float32 where torch computes many rows of this type faster so. Its kernel takes the
    elements of a head to be contiguous."""
    wide = len(by_head) >= MIN_ROWS and faster_in_float32(by_head.dtype)
    parts = (x if x.stride(-1) == 1 else x.contiguous() for x in (by_head, k, v))
    return [x.float() if wide else x for x in parts]
