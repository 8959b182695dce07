"""Candidate pages: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, require_cpu


def choose(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.candidate_pages.candidate_pages`."""
    op = "candidate_pages"
    require_cpu(op, log_mass, seq_lens, active)
    batch, num_qo_heads, max_pages = log_mass.shape
    flags = torch.empty(batch, num_kv_heads, max_pages, dtype=torch.uint8)
    chosen = torch.empty(batch, num_kv_heads, dtype=torch.int32)
    args = abi.CandidateArgs(
        batch=batch,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        max_pages=max_pages,
        count=min(count, max_pages),
        num_threads=torch.get_num_threads(),
        log_mass=log_mass.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        active=active.data_ptr(),
        candidates=flags.data_ptr(),
        chosen=chosen.data_ptr(),
    )
    call(op, "psa_candidate_pages", args)
    return flags, chosen
