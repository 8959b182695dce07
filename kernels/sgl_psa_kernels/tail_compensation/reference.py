"""Tail compensation in plain torch: the specification."""

import torch

from sgl_psa_kernels import checks


def compensate(
    out: torch.Tensor,
    lse: torch.Tensor,
    log_mass: torch.Tensor,
    attended: torch.Tensor,
    value_means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    page_size: int,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.tail_compensation.compensate`; a float64 ``out`` computes in
    float64."""
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    group = out.shape[1] // value_means.shape[1]
    result = out.clone()
    for b in range(out.shape[0]):
        if not active[b]:
            continue
        n = checks.check_row_length(
            "tail_compensation", b, int(seq_lens[b]), page_table.shape[1], page_size
        )
        for h in range(out.shape[1]):
            left = [j for j in range(n) if not attended[b, h // group, j]]
            if not left:
                continue
            masses = torch.cat([lse[b, h, None], log_mass[b, h, left]]).to(work)
            share = masses.softmax(0)
            means = value_means[page_table[b, left].long(), h // group].to(work)
            whole = torch.cat([out[b, h, None].to(work), means])
            result[b, h] = (share @ whole).to(out.dtype)
    return result
