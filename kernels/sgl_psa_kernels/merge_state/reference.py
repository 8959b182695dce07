"""Merge two partial attention results: the specification."""

import torch


def merge_state(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.merge_state.merge_state`."""
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == float("-inf")
    base = torch.where(empty, torch.zeros_like(lse), lse)
    # An empty part has weight 0, but its output may hold anything, NaN included.
    weight_a = torch.exp(lse_a - base).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).unsqueeze(-1)
    work = torch.promote_types(o_a.dtype, lse.dtype)
    part_a = torch.where(weight_a > 0, o_a.to(work) * weight_a, torch.zeros_like(weight_a))
    part_b = torch.where(weight_b > 0, o_b.to(work) * weight_b, torch.zeros_like(weight_b))
    return (part_a + part_b).to(o_a.dtype), lse
