"""Low-bit codes of keys: the affine and the rotated form."""

import torch

from sgl_psa_kernels.key_sketch.rotation import rotate

#: Distance of two levels in standard deviations: least squared error of uniform levels for normally
#: distributed elements (Max, 1960). With one bit every distance gives the same codes.
STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352}


def affine_codes(keys: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D] and affine float16 [..., 2] (scale, zero) of keys [..., D]:
    ``k ~ zero + scale * code``."""
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


def rotated_codes(
    keys: torch.Tensor, bits: int, signs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D] and scale float16 [..., 1] of keys [..., D]:
    ``rotate(k) ~ scale * (code - (2^bits - 1) / 2)``.

    The scale makes the product of the key with its own sketch exact, so that the estimate of q.k
    has no error along k. A key without a finite scale has NaN.
    """
    r = rotate(keys, signs)
    square = r.square().sum(-1, keepdim=True)
    step = STEPS[bits] * (square / r.shape[-1]).sqrt()
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    position = (r * inverse + 2 ** (bits - 1)).nan_to_num(0.0, 0.0, 0.0)
    codes = position.clamp(0, 2**bits - 1).floor()
    along = ((codes - (2**bits - 1) / 2) * r).sum(-1, keepdim=True)
    scale = torch.where(square == 0, torch.zeros_like(square), square / along).half()
    return codes.to(torch.uint8), scale.masked_fill(~scale.isfinite(), float("nan"))
