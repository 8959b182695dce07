"""Two-part prefill attention with torch's flash attention for CPU."""

import torch

from sgl_psa_kernels.merge_state.reference import merge_state
from sgl_psa_kernels.wide_products import MIN_ROWS, faster_in_float32

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def prefill(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.prefill_attention.prefill`.

    The prefix is seen by every query, so the G query heads of a KV head fold into its query rows:
    one call reads each key once for all of them. The causal chunk takes one call per g with the
    keys and values as they are. 16-bit input is computed in float32 where that is faster.
    """
    new, num_qo_heads, dim = q.shape
    if new >= MIN_ROWS and faster_in_float32(q.dtype):
        if k_prefix is not None and v_prefix is not None:
            k_prefix, v_prefix = k_prefix.float(), v_prefix.float()
        chunk = k_chunk.float(), v_chunk.float()
        out, lse = prefill(q.float(), k_prefix, v_prefix, *chunk, sm_scale=sm_scale)
        return out.to(q.dtype), lse
    num_kv_heads = k_chunk.shape[1]
    group = num_qo_heads // num_kv_heads
    out = torch.empty(new, num_kv_heads, group, dim, dtype=q.dtype)
    lse = torch.empty(new, num_kv_heads, group)
    if new == 0:
        return out.view(q.shape), lse.view(new, num_qo_heads)
    by_head = q.unflatten(1, (num_kv_heads, group))
    k_new = k_chunk.transpose(0, 1).unsqueeze(0)
    v_new = v_chunk.transpose(0, 1).unsqueeze(0)
    for g in range(group):
        queries = by_head[:, :, g].transpose(0, 1).unsqueeze(0)
        o, part = _flash(queries, k_new, v_new, 0.0, True, scale=sm_scale)
        out[:, :, g] = o[0].transpose(0, 1)
        lse[:, :, g] = part[0].T
    if k_prefix is not None and v_prefix is not None:
        folded = by_head.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * new, dim)
        o, part = _flash(
            folded,
            k_prefix.transpose(0, 1).unsqueeze(0),
            v_prefix.transpose(0, 1).unsqueeze(0),
            0.0,
            False,
            scale=sm_scale,
        )
        o_prefix = o[0].view(num_kv_heads, group, new, dim).permute(2, 0, 1, 3)
        lse_prefix = part[0].reshape(num_kv_heads, group, new).permute(2, 0, 1)
        out, lse = merge_state(out, lse, o_prefix, lse_prefix)
    return out.reshape(q.shape), lse.reshape(new, num_qo_heads).float()
