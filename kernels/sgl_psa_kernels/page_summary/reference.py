"""Page summaries in plain torch: the specification."""

import torch

from sgl_psa_kernels import checks


def update(
    k_cache: torch.Tensor,
    pages: torch.Tensor,
    fill: torch.Tensor,
    summary: torch.Tensor,
    *,
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
        summary[page] = summarise(k_cache[first : first + tokens]).to(summary.dtype)


def summarise(keys: torch.Tensor) -> torch.Tensor:
    """Summary float32 [Hkv, 4, D] of the keys [tokens, Hkv, D] of a page."""
    x = keys.float()
    mean = x.mean(0)
    variance = (x - mean).square().mean(0)
    centre = (x.amin(0) + x.amax(0)) / 2
    radius = (x - centre).abs().mean(0)
    return torch.stack([mean, variance, centre, radius], dim=1)


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
        # each [n, Hkv, 1, D]
        mean, variance, centre, radius = summary[pages].to(work).unsqueeze(2).unbind(3)
        x = sm_scale * q[b].to(work).unflatten(0, (num_kv_heads, -1))
        tokens = (seq_len - page_size * torch.arange(n)).clamp(max=page_size)
        log_tokens = tokens.to(work).log().view(n, 1, 1)
        gaussian = log_tokens + (x * mean + 0.5 * x.square() * variance).sum(-1)
        cuboid = (x * centre + x.abs() * radius).sum(-1)
        estimate = torch.logaddexp(gaussian, cuboid).flatten(1).T
        invalid = (watermark[pages] < tokens) | ~(estimate < float("inf"))
        log_mass[b, :, :n] = estimate.masked_fill(invalid, float("inf"))
    return log_mass
