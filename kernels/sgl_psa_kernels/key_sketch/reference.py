"""Key sketches in plain torch: the specification."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.key_sketch.codes import affine_codes, rotated_codes
from sgl_psa_kernels.key_sketch.packing import byte_places, pack, packed_rows, unpack


def write(
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    signs: torch.Tensor | None,
    *,
    bits: int,
    page_size: int,
    in_order: bool = False,
) -> None:
    """See :func:`sgl_psa_kernels.key_sketch.write`."""
    if slots.numel() == 0:
        return
    low, high = int(slots.min()), int(slots.max())
    count = codes.shape[0] * page_size
    checks.require(
        low >= 0 and high < count,
        f"key_sketch.write: slots {low}..{high} outside of the pool of {count} slots",
    )
    keys = k_cache if in_order else k_cache[slots]
    coded = affine_codes(keys, bits) if signs is None else rotated_codes(keys, bits, signs)
    pages = slots // page_size
    offsets = slots % page_size
    heads = torch.arange(codes.shape[1], device=codes.device)
    places = byte_places(offsets, page_size, codes.shape[3])
    stored = codes.view(*codes.shape[:2], -1)
    stored[pages[:, None, None], heads[:, None], places[:, None]] = pack(coded[0], bits)
    affine[pages, :, offsets] = coded[1]


def scale_and_zero(affine: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) [...] of affine [..., 2], or of the scales [..., 1] of rotated sketches."""
    if affine.shape[-1] == 1:
        scale = affine[..., 0]
        return scale, scale * (-(2**bits - 1) / 2)
    return affine[..., 0], affine[..., 1]


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
    """See :func:`sgl_psa_kernels.key_sketch.score`; float64 queries compute in float64."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_qo_heads, _ = q.shape
    num_kv_heads = codes.shape[1]
    if log_mass is None:
        log_mass = torch.full((batch, num_qo_heads, page_table.shape[1]), float("nan"), dtype=work)
    for b in range(batch):
        if not active[b]:
            continue
        seq_len = int(seq_lens[b])
        n = checks.check_row_length("key_sketch.score", b, seq_len, page_table.shape[1], page_size)
        if n == 0:
            continue
        pages = page_table[b, :n].long()
        scale, zero = scale_and_zero(affine[pages].to(work), bits)
        coded = unpack(packed_rows(codes[pages]), bits).to(work)
        keys = zero.unsqueeze(-1) + scale.unsqueeze(-1) * coded
        heads = q[b].to(work).unflatten(0, (num_kv_heads, -1))
        # [Hkv, G, n, P]
        logits = sm_scale * torch.einsum("hgd,nhpd->hgnp", heads, keys)
        position = torch.arange(n * page_size).view(n, page_size)
        logits = logits.masked_fill(position >= seq_len, float("-inf"))
        estimate = torch.logsumexp(logits, dim=-1)
        estimate = estimate.masked_fill(~(estimate < float("inf")), float("inf"))
        tokens = (seq_len - page_size * torch.arange(n)).clamp(max=page_size)
        stale = watermark[pages] < tokens
        estimate = estimate.masked_fill(stale, float("inf"))
        kept = log_mass[b, :, :n].unflatten(0, (num_kv_heads, -1))
        if candidates is not None:
            estimate = torch.where(candidates[b, :, None, :n] == 0, kept, estimate)
        kept.copy_(estimate)
    return log_mass
