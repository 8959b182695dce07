"""Tail compensation for any torch device, all rows at once."""

from __future__ import annotations

import torch


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
    """See :func:`sgl_psa_kernels.tail_compensation.compensate`."""
    heads = value_means.shape[1]
    place = torch.arange(page_table.shape[1], device=out.device)
    exists = (place * page_size < seq_lens[:, None]) & (active[:, None] != 0)
    left = exists[:, None] & (attended == 0)
    pages = torch.where(exists, page_table.long(), 0)
    # A page that is attended may have no mean yet; NaN times a share of zero would be NaN.
    means = value_means[pages].float().masked_fill(~left.transpose(1, 2)[..., None], 0.0)
    rest = log_mass.unflatten(1, (heads, -1)).masked_fill(~left[:, :, None], -torch.inf)
    mass = lse.unflatten(1, (heads, -1))
    total = torch.logaddexp(mass, rest.logsumexp(-1))
    share = (rest - total[..., None]).exp()
    known = out.float().unflatten(1, (heads, -1)) * (mass - total).exp()[..., None]
    whole = known + torch.einsum("bhgm,bmhd->bhgd", share, means)
    changed = left.any(-1)[..., None, None]
    return torch.where(changed, whole.to(out.dtype), out.unflatten(1, (heads, -1))).flatten(1, 2)
