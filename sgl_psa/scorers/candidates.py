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
    margin: float,
) -> torch.Tensor:
    """Pages that may matter to some query head of a KV head.

    A page is a candidate of a KV head if it is among the ``count`` largest, by the largest share of
    the mass that it has under any query head of the group, and if for some of these heads its
    estimate is at most ``margin`` below the head's largest. Pages with estimate +inf (attended
    anyway) are not candidates, nor are pages of inactive rows.

    Args:
        log_mass: float32 [B, Hq, max_pages], estimates of the first level.
        margin: nats.

    Returns:
        uint8 [B, Hkv, max_pages].
    """
    place = torch.arange(log_mass.shape[2], device=log_mass.device)
    inside = (place * page_size < batch.seq_lens[:, None]) & (batch.active[:, None] != 0)
    heads = log_mass.unflatten(1, (num_kv_heads, -1))
    usable = inside[:, None, None] & (heads < float("inf"))
    heads = heads.masked_fill(~usable, float("-inf"))
    below_best = (heads - heads.amax(-1, keepdim=True)).amax(2)  # nan where a row has no page
    share = (heads - heads.logsumexp(-1, keepdim=True)).amax(2)
    keep = below_best >= -margin
    if count < share.shape[-1]:
        ranked = share.masked_fill(~keep, float("-inf")).topk(count, -1).indices
        keep &= torch.zeros_like(keep).scatter_(-1, ranked, True)
    return keep.to(torch.uint8)
