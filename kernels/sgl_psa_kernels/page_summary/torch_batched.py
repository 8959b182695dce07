"""Page summaries for any torch device, all rows and pages at once."""

from __future__ import annotations

import torch

from sgl_psa_kernels.page_summary.storage import load, pack


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
    x = k_cache.unflatten(0, (-1, page_size))[pages].float()  # [M, P, Hkv, D]
    live = (torch.arange(page_size, device=x.device) < fill[:, None])[..., None, None]
    n = fill.float()[:, None, None]
    parts: list[torch.Tensor] = []
    if kind in ("hybrid", "mean", "gaussian"):
        mean = x.masked_fill(~live, 0.0).sum(1) / n
        parts.append(mean)
        if kind != "mean":
            distance = (x - mean[:, None]).masked_fill(~live, 0.0)
            parts.append(distance.square().sum(1) / n)
    if kind in ("hybrid", "cuboid_mean", "box"):
        low = x.masked_fill(~live, float("inf")).amin(1)
        high = x.masked_fill(~live, float("-inf")).amax(1)
        if kind == "box":
            parts += [low, high]
        else:
            centre = (low + high) / 2
            distance = (x - centre[:, None]).masked_fill(~live, 0.0)
            parts += [centre, distance.abs().sum(1) / n]
    summary[pages], affines = pack(parts, kind, 16 if affine is None else 8)
    if affine is not None:
        affine[pages] = affines


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
    x = (q.float() * sm_scale).unflatten(1, (summary.shape[1], -1))
    place = torch.arange(page_table.shape[1], device=q.device)
    tokens = (seq_lens.long()[:, None] - place * page_size).clamp(0, page_size)
    pages = torch.where(tokens > 0, page_table.long(), 0)
    vectors = load(summary, affine, pages).unbind(3)  # each [B, M, Hkv, D]
    estimate = _estimate(x, vectors, tokens.clamp(min=1).float().log()[:, None, None], kind)
    stale = (watermark[pages] < tokens)[:, None, None] | ~(estimate < float("inf"))
    return estimate.masked_fill(stale, float("inf")).flatten(1, 2)


def _estimate(
    x: torch.Tensor, vectors: tuple[torch.Tensor, ...], log_tokens: torch.Tensor, kind: str
) -> torch.Tensor:
    def dot(query: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhgd,bmhd->bhgm", query, vector)

    if kind == "mean":
        return log_tokens + dot(x, vectors[0])
    if kind in ("cuboid_mean", "box", "hybrid"):
        spread = dot(x, vectors[-2]) + dot(x.abs(), vectors[-1])
        if kind != "hybrid":
            return spread + log_tokens if kind == "box" else spread
    gaussian = log_tokens + dot(x, vectors[0]) + 0.5 * dot(x.square(), vectors[1])
    return gaussian if kind == "gaussian" else torch.logaddexp(gaussian, spread)
