"""Progressive decode attention: binding of the C++ kernels."""

import torch

from sgl_psa_kernels._native.call import require_cpu
from sgl_psa_kernels.progressive_decode.modes import NUM_STATS
from sgl_psa_kernels.progressive_decode.prepared import PreparedDecode


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
    group_percent: int = 0,
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`."""
    op = "progressive_decode"
    require_cpu(op, log_mass, kappa_floor, kappa_std, first_pages, attended, kappa_start, residuals)
    decode = PreparedDecode(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        mode,
        threshold,
        kappa_floor,
        kappa_std,
        page_size=page_size,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        group_pages=group_pages,
        group_percent=group_percent,
    )
    stats = torch.empty(1, q.shape[0], k_cache.shape[1], NUM_STATS, dtype=torch.float32)
    out, lse = decode(
        q,
        k_cache,
        v_cache,
        log_mass,
        stats,
        0,
        sm_scale=sm_scale,
        first_pages=first_pages,
        attended=attended,
        kappa_start=kappa_start,
        residuals=residuals,
    )
    return out, lse, stats[0]
