"""Candidate pages: where a second, finer level of scoring is worth its bytes."""

from __future__ import annotations

import torch

from sgl_psa.scorers.base import PageBatch


def choose_candidates(
    log_mass: torch.Tensor,
    batch: PageBatch,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> torch.Tensor:
    """The ``count`` pages of each KV head that have the largest share of the estimated mass under
    any query head of its group.

    A count and not a distance in nats from the best page: the error of estimates grows with the
    length of queries and keys, and reaches ten nats in heads that look single keys up. Pages with
    estimate +inf (attended anyway) are not candidates, nor are pages of inactive rows.

    Args:
        log_mass: float32 [B, Hq, max_pages], estimates of the first level.

    Returns:
        uint8 [B, Hkv, max_pages]; rows with fewer usable pages have fewer candidates.
    """
    place = torch.arange(log_mass.shape[2], device=log_mass.device)
    inside = (place * page_size < batch.seq_lens[:, None]) & (batch.active[:, None] != 0)
    heads = log_mass.unflatten(1, (num_kv_heads, -1))
    usable = inside[:, None, None] & (heads < float("inf"))
    heads = heads.masked_fill(~usable, float("-inf"))
    keep = usable.any(2)
    if count < keep.shape[-1]:
        share = (heads - heads.logsumexp(-1, keepdim=True)).amax(2)
        ranked = share.masked_fill(~keep, float("-inf")).topk(count, -1).indices
        keep &= torch.zeros_like(keep).scatter_(-1, ranked, True)
    return keep.to(torch.uint8)
