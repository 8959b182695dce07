"""Candidate pages in Triton: one launch, nothing is sorted."""

import torch

from sgl_psa_kernels.triton_support import kernels, power_of_two


def choose(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.candidate_pages.candidate_pages`; lengths are not checked."""
    op = "candidate_pages"
    module = kernels(op, "candidate_pages.triton_kernels", log_mass, seq_lens, active)
    log_mass = log_mass.contiguous()
    batch, num_q, pages = log_mass.shape
    shape, group = (batch, num_kv_heads, pages), num_q // num_kv_heads
    flags = torch.empty(shape, dtype=torch.uint8, device=log_mass.device)
    chosen = torch.empty(shape[:2], dtype=torch.int32, device=log_mass.device)
    if flags.numel() == 0:
        return flags, chosen.zero_()
    key = torch.empty(shape, dtype=torch.int32, device=log_mass.device)
    with torch.cuda.device_of(log_mass):
        module.choose[(batch * num_kv_heads,)](
            log_mass, seq_lens, active, key, flags, chosen, pages, min(count, pages),
            HKV=num_kv_heads, G=group, GT=power_of_two(group), PAGE=page_size,
            BLOCK=max(16, min(8192 // power_of_two(group), power_of_two(pages, 16))), num_warps=8,
        )  # fmt: skip
    return flags, chosen
