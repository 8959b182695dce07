"""Sketch scoring for any torch device, all rows at once; writing is the reference's, vectorised."""

from __future__ import annotations

import torch

from sgl_psa_kernels.key_sketch.packing import packed_rows, unpack
from sgl_psa_kernels.key_sketch.reference import scale_and_zero

#: Pages unpacked at once; bounds the memory of the unpacked keys.
CHUNK = 128


def score(
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    candidates: torch.Tensor | None,
    log_mass: torch.Tensor | None,
    *,
    bits: int,
    page_size: int,
    sm_scale: float,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.key_sketch.score`."""
    x = (q.float() * sm_scale).unflatten(1, (codes.shape[1], -1))
    place = torch.arange(page_table.shape[1], device=q.device)
    tokens = (seq_lens.long()[:, None] - place * page_size).clamp(0, page_size)
    table = torch.where(tokens > 0, page_table.long(), 0)
    parts = []
    for start in range(0, page_table.shape[1], CHUNK):
        pages = table[:, start : start + CHUNK]
        used = tokens[:, start : start + CHUNK]
        scale, zero = scale_and_zero(affine[pages].float(), bits)  # [B, K, Hkv, P]
        keys = unpack(packed_rows(codes[pages]), bits).float()
        dots = torch.einsum("bhgd,bkhpd->bhgkp", x, keys)
        shift = x.sum(-1)[..., None, None] * zero.movedim(1, 2)[:, :, None]
        logits = dots * scale.movedim(1, 2)[:, :, None] + shift
        live = torch.arange(page_size, device=q.device) < used[..., None]
        logits = logits.masked_fill(~live[:, None, None], float("-inf"))
        estimate = torch.logsumexp(logits, -1)
        stale = (watermark[pages] < used)[:, None, None]
        estimate = estimate.masked_fill(~(estimate < float("inf")), float("inf"))
        parts.append(estimate.masked_fill(stale, float("inf")))
    estimate = torch.cat(parts, -1)
    if log_mass is None:
        return estimate.flatten(1, 2)
    if candidates is not None:
        kept = log_mass.unflatten(1, estimate.shape[1:3])
        estimate = torch.where(candidates[:, :, None] == 0, kept, estimate)
    return log_mass.copy_(estimate.flatten(1, 2))
