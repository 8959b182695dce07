"""Page summaries: binding of the C++ kernels."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu, rows
from sgl_psa_kernels.page_summary.kinds import VECTORS

_KINDS = {kind: code for code, kind in enumerate(VECTORS)}  # PsaSummaryKind


def update(
    k_cache: torch.Tensor,
    pages: torch.Tensor,
    fill: torch.Tensor,
    summary: torch.Tensor,
    *,
    affine: torch.Tensor | None,
    kind: str,
    page_size: int,
) -> None:
    """See :func:`sgl_psa_kernels.page_summary.update`."""
    op = "page_summary.update"
    require_cpu(op, k_cache, pages, fill, summary, affine)
    args = abi.SummaryUpdateArgs(
        num_kv_heads=k_cache.shape[1],
        head_dim=k_cache.shape[2],
        page_size=page_size,
        dtype=dtype_code(op, k_cache),
        num_pages=summary.shape[0],
        num_threads=torch.get_num_threads(),
        kind=_KINDS[kind],
        count=pages.shape[0],
        k_token_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1),
        k=k_cache.data_ptr(),
        pages=pages.data_ptr(),
        fill=fill.data_ptr(),
        summary=summary.data_ptr(),
        affine=None if affine is None else affine.data_ptr(),
    )
    call(op, "psa_summary_update", args)


def score(
    q: torch.Tensor,
    summary: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    affine: torch.Tensor | None,
    kind: str,
    page_size: int,
    sm_scale: float,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.page_summary.score`."""
    op = "page_summary.score"
    require_cpu(op, q, summary, affine, watermark, page_table, seq_lens, active)
    log_mass = torch.empty(q.shape[0], q.shape[1], page_table.shape[1], dtype=torch.float32)
    args = abi.SummaryScoreArgs(
        rows=rows(
            op,
            q,
            page_table,
            seq_lens,
            num_kv_heads=summary.shape[1],
            num_pages=summary.shape[0],
            page_size=page_size,
            sm_scale=sm_scale,
        ),
        kind=_KINDS[kind],
        summary=summary.data_ptr(),
        affine=None if affine is None else affine.data_ptr(),
        watermark=watermark.data_ptr(),
        active=active.data_ptr(),
        log_mass=log_mass.data_ptr(),
    )
    call(op, "psa_summary_score", args)
    return log_mass
