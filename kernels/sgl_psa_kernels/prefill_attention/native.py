"""Two-part prefill attention: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu
from sgl_psa_kernels.prefill_attention.blocks import Blocks

OP = "prefill_attention"


def prefill(
    q: torch.Tensor,
    prefix: Blocks,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.prefill_attention.prefill`.

    Computed in float32, but where the CPU multiplies bf16 numbers: there softmax weights of bf16
    input are rounded to bf16 for their product with the values, as FlashAttention does
    (arXiv 2205.14135). Their sum, and so lse, is not.
    """
    out = torch.zeros(q.shape, dtype=torch.float32)
    lse = torch.full(q.shape[:2], float("-inf"))
    _add(q, k_chunk, v_chunk, out, lse, sm_scale, causal=True)
    for k, v in prefix:
        _add(q, k, v, out, lse, sm_scale, causal=False)
    return out.to(q.dtype), lse


def _add(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sm_scale: float,
    *,
    causal: bool,
) -> None:
    """Add keys to the attention in ``out`` and ``lse``; causal: query i sees keys 0..i."""
    require_cpu(OP, q, k, v)
    k, v = _with_contiguous_heads(k), _with_contiguous_heads(v)
    num_kv_heads = k.shape[1]
    args = abi.PrefillArgs(
        tokens=len(q),
        keys=len(k),
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        head_dim=q.shape[2],
        dtype=dtype_code(OP, q),
        causal=causal,
        num_threads=torch.get_num_threads(),
        sm_scale=sm_scale,
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    call(OP, "psa_prefill", args)


def _with_contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
