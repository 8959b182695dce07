"""Page summaries in plain torch: the specification."""

import torch

from sgl_psa_kernels import checks
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
    for page, tokens in zip(pages.tolist(), fill.tolist(), strict=True):
        checks.require(
            0 <= page < summary.shape[0],
            f"page_summary.update: page {page} outside of the pool of {summary.shape[0]} pages",
        )
        checks.require(
            1 <= tokens <= page_size,
            f"page_summary.update: fill of page {page} must be 1..{page_size}, got {tokens}",
        )
        first = page * page_size
        parts = summarise(k_cache[first : first + tokens], kind)
        summary[page], affines = pack(parts, kind, 16 if affine is None else 8)
        if affine is not None:
            affine[page] = affines


def summarise(keys: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Vectors float32 [Hkv, D] of the keys [tokens, Hkv, D] of a page, as ``pack`` takes them."""
    x = keys.float()
    parts = []
    if kind in ("hybrid", "mean", "gaussian"):
        mean = x.mean(0)
        parts.append(mean)
        if kind != "mean":
            parts.append((x - mean).square().mean(0))
    if kind in ("hybrid", "cuboid_mean"):
        centre = (x.amin(0) + x.amax(0)) / 2
        parts += [centre, (x - centre).abs().mean(0)]
    if kind == "box":
        parts += [x.amin(0), x.amax(0)]
    return parts


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
    """See :func:`sgl_psa_kernels.page_summary.score`; float64 queries compute in float64."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_qo_heads, _ = q.shape
    num_kv_heads = summary.shape[1]
    log_mass = torch.full((batch, num_qo_heads, page_table.shape[1]), float("nan"), dtype=work)
    for b in range(batch):
        if not active[b]:
            continue
        seq_len = int(seq_lens[b])
        n = checks.check_row_length(
            "page_summary.score", b, seq_len, page_table.shape[1], page_size
        )
        if n == 0:
            continue
        pages = page_table[b, :n].long()
        x = sm_scale * q[b].to(work).unflatten(0, (num_kv_heads, -1))
        tokens = (seq_len - page_size * torch.arange(n)).clamp(max=page_size)
        vectors = (
            load(summary, affine, pages).to(work).unsqueeze(2).unbind(3)
        )  # each [n, Hkv, 1, D]
        found = estimate(x, vectors, tokens.to(work).log().view(n, 1, 1), kind).flatten(1).T
        invalid = (watermark[pages] < tokens) | ~(found < float("inf"))
        log_mass[b, :, :n] = found.masked_fill(invalid, float("inf"))
    return log_mass


def estimate(
    x: torch.Tensor, vectors: tuple[torch.Tensor, ...], log_tokens: torch.Tensor, kind: str
) -> torch.Tensor:
    """The estimate of ``kind``: x [Hkv, G, D], vectors [n, Hkv, 1, D], log_tokens [n, 1, 1]."""
    if kind == "mean":
        return log_tokens + (x * vectors[0]).sum(-1)
    spread = (x * vectors[-2] + x.abs() * vectors[-1]).sum(-1)
    if kind == "cuboid_mean":
        return spread
    if kind == "box":
        return log_tokens + spread
    gaussian = log_tokens + (x * vectors[0] + 0.5 * x.square() * vectors[1]).sum(-1)
    return gaussian if kind == "gaussian" else torch.logaddexp(gaussian, spread)
