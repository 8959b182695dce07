"""Page summaries for any torch device, all rows and pages at once."""

from __future__ import annotations

import torch


def update(
    k_cache: torch.Tensor,
    pages: torch.Tensor,
    fill: torch.Tensor,
    summary: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """See :func:`sgl_psa_kernels.page_summary.update`."""
    x = k_cache.unflatten(0, (-1, page_size))[pages].float()  # [M, P, Hkv, D]
    live = (torch.arange(page_size, device=x.device) < fill[:, None])[..., None, None]
    n = fill.float()[:, None, None]
    clean = x.masked_fill(~live, 0.0)
    mean = clean.sum(1) / n
    variance = (x - mean[:, None]).masked_fill(~live, 0.0).square().sum(1) / n
    low = x.masked_fill(~live, float("inf")).amin(1)
    high = x.masked_fill(~live, float("-inf")).amax(1)
    centre = (low + high) / 2
    radius = (x - centre[:, None]).masked_fill(~live, 0.0).abs().sum(1) / n
    summary[pages] = torch.stack([mean, variance, centre, radius], 2).to(summary.dtype)


def score(
    q: torch.Tensor,
    summary: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    page_size: int,
    sm_scale: float,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.page_summary.score`."""
    x = (q.float() * sm_scale).unflatten(1, (summary.shape[1], -1))
    place = torch.arange(page_table.shape[1], device=q.device)
    tokens = (seq_lens.long()[:, None] - place * page_size).clamp(0, page_size)
    pages = torch.where(tokens > 0, page_table.long(), 0)
    mean, variance, centre, radius = summary[pages].float().unbind(3)  # [B, M, Hkv, D]
    gaussian = torch.einsum("bhgd,bmhd->bhgm", x, mean)
    gaussian += 0.5 * torch.einsum("bhgd,bmhd->bhgm", x.square(), variance)
    gaussian += tokens.clamp(min=1).float().log()[:, None, None]
    cuboid = torch.einsum("bhgd,bmhd->bhgm", x, centre)
    cuboid += torch.einsum("bhgd,bmhd->bhgm", x.abs(), radius)
    estimate = torch.logaddexp(gaussian, cuboid)
    stale = (watermark[pages] < tokens)[:, None, None] | ~(estimate < float("inf"))
    return estimate.masked_fill(stale, float("inf")).flatten(1, 2)
