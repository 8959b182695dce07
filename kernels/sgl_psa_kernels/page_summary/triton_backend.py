"""Page summaries in Triton."""

import torch

from sgl_psa_kernels.page_summary.kinds import VECTORS
from sgl_psa_kernels.triton_support import head_tile, kernels, power_of_two

#: Pages scored by one program.
PAGES = 32


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
    """See :func:`sgl_psa_kernels.page_summary.update`; page numbers and fills are not checked."""
    folder = "page_summary.triton_kernels"
    given = (k_cache, pages, fill, summary, affine)
    module = kernels("page_summary.update", folder, *given)
    _, num_kv, dim = k_cache.shape
    if pages.shape[0] == 0:
        return
    with torch.cuda.device_of(k_cache):
        module.update[(pages.shape[0], num_kv)](
            *given, *k_cache.stride()[:2],
            HKV=num_kv, D=dim, DT=power_of_two(dim), PAGE=page_size,
            VECTORS=VECTORS[kind], KIND=kind, CODES=affine is not None,
            num_warps=4 if page_size * dim <= 8192 else 8,
        )  # fmt: skip


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
    """See :func:`sgl_psa_kernels.page_summary.score`; page numbers are not checked."""
    given = (q, summary, affine, watermark, page_table, seq_lens, active)
    module = kernels("page_summary.score", "page_summary.triton_kernels", *given)
    batch, num_q, dim = q.shape
    num_kv, pages = summary.shape[1], page_table.shape[1]
    log_mass = torch.empty(batch, num_q, pages, dtype=torch.float32, device=q.device)
    if log_mass.numel() == 0:
        return log_mass
    with torch.cuda.device_of(q):
        module.score[(batch * num_kv, -(-pages // PAGES))](
            *given, log_mass, *q.stride()[:2], page_table.stride(0), pages, sm_scale,
            HKV=num_kv, G=num_q // num_kv, GT=head_tile(num_q // num_kv),
            D=dim, DT=power_of_two(dim), PAGE=page_size, PAGES=PAGES,
            VECTORS=VECTORS[kind], KIND=kind, CODES=affine is not None,
            num_warps=8,
        )  # fmt: skip
    return log_mass
