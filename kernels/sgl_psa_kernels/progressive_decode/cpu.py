"""Progressive decode attention: binding of the C++ kernels."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, require_cpu, rows
from sgl_psa_kernels.progressive_decode.modes import NUM_STATS


def progressive_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    log_mass: torch.Tensor | None,
    mode: torch.Tensor,
    threshold: torch.Tensor,
    kappa_floor: torch.Tensor,
    kappa_std: torch.Tensor,
    *,
    page_size: int,
    sm_scale: float,
    sink_pages: int,
    recent_pages: int,
    group_pages: int,
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`."""
    op = "progressive_decode"
    require_cpu(op, q, k_cache, v_cache, page_table, seq_lens, log_mass, mode, threshold)
    require_cpu(op, kappa_floor, kappa_std, first_pages, attended, kappa_start, residuals)
    batch, num_qo_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(batch, num_qo_heads, dtype=torch.float32)
    stats = torch.empty(batch, num_kv_heads, NUM_STATS, dtype=torch.float32)
    args = abi.DecodeArgs(
        rows=rows(
            op,
            q,
            page_table,
            seq_lens,
            num_kv_heads=num_kv_heads,
            num_pages=k_cache.shape[0] // page_size,
            page_size=page_size,
            sm_scale=sm_scale,
        ),
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        group_pages=group_pages,
        k_token_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1),
        v_token_stride=v_cache.stride(0),
        v_head_stride=v_cache.stride(1),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        log_mass=None if log_mass is None else log_mass.data_ptr(),
        mode=mode.data_ptr(),
        threshold=threshold.data_ptr(),
        kappa_floor=kappa_floor.data_ptr(),
        kappa_std=kappa_std.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        stats=stats.data_ptr(),
        first_pages=None if first_pages is None else first_pages.data_ptr(),
        attended=None if attended is None else attended.data_ptr(),
        kappa_start=None if kappa_start is None else kappa_start.data_ptr(),
        residuals=None if residuals is None else residuals.data_ptr(),
    )
    call(op, "psa_progressive_decode", args)
    return out, lse, stats
