"""Key sketches in plain torch: the specification."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.key_sketch.packing import pack, unpack


def write(
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    *,
    bits: int,
    page_size: int,
) -> None:
    """See :func:`sgl_psa_kernels.key_sketch.write`."""
    if slots.numel() == 0:
        return
    low, high = int(slots.min()), int(slots.max())
    checks.require(
        low >= 0 and high < k_cache.shape[0],
        f"key_sketch.write: slots {low}..{high} outside of the pool of {k_cache.shape[0]} slots",
    )
    new_codes, new_affine = sketch(k_cache[slots], bits)
    pages = slots // page_size
    offsets = slots % page_size
    codes[pages, :, offsets] = pack(new_codes, bits)
    affine[pages, :, offsets] = new_affine


def sketch(keys: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D] and affine float16 [..., 2] (scale, zero) of keys [..., D]."""
    x = keys.float()
    if bits == 1:
        mean = x.mean(-1)
        deviation = (x - mean.unsqueeze(-1)).abs().mean(-1)
        zero, scale = mean - deviation, 2 * deviation
    else:
        zero = x.amin(-1)
        scale = (x.amax(-1) - zero) / (2**bits - 1)
    affine = torch.stack([scale, zero], dim=-1).half()
    # Codes belong to the affine that is stored, not to the one before rounding.
    scale = affine[..., 0].float().unsqueeze(-1)
    zero = affine[..., 1].float().unsqueeze(-1)
    if bits == 1:
        codes = x > zero + 0.5 * scale
    else:
        # Round to the nearest code, ties to even; a scale of 0 means that all elements are equal.
        position = torch.where(scale > 0, (x - zero) / scale, torch.zeros_like(x))
        codes = position.nan_to_num(0.0).clamp(0, 2**bits - 1).round()
    return codes.to(torch.uint8), affine


def score(
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    bits: int,
    page_size: int,
    sm_scale: float,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.key_sketch.score`; float64 queries compute in float64."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_qo_heads, _ = q.shape
    num_kv_heads = codes.shape[1]
    log_mass = torch.full((batch, num_qo_heads, page_table.shape[1]), float("nan"), dtype=work)
    for b in range(batch):
        if not active[b]:
            continue
        seq_len = int(seq_lens[b])
        n = checks.check_row_length("key_sketch.score", b, seq_len, page_table.shape[1], page_size)
        if n == 0:
            continue
        pages = page_table[b, :n].long()
        scale, zero = affine[pages].to(work).unbind(-1)
        keys = zero.unsqueeze(-1) + scale.unsqueeze(-1) * unpack(codes[pages], bits).to(work)
        heads = q[b].to(work).unflatten(0, (num_kv_heads, -1))
        # [Hkv, G, n, P]
        logits = sm_scale * torch.einsum("hgd,nhpd->hgnp", heads, keys)
        position = torch.arange(n * page_size).view(n, page_size)
        logits = logits.masked_fill(position >= seq_len, float("-inf"))
        estimate = torch.logsumexp(logits, dim=-1).flatten(0, 1)
        tokens = (seq_len - page_size * torch.arange(n)).clamp(max=page_size)
        invalid = (watermark[pages] < tokens) | ~(estimate < float("inf"))
        log_mass[b, :, :n] = estimate.masked_fill(invalid, float("inf"))
    return log_mass
