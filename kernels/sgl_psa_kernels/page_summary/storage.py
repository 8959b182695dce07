"""Storage of page summaries: vectors in bfloat16, or 8 bits an element with an affine per vector.

8 bits: ``element ~ zero + scale * code``, code 0 .. 255, scale and zero bfloat16. zero is rounded
down and scale up, so that the codes span the whole vector and no variance or radius is negative;
bfloat16 has the range of the keys, and ``scale * code`` is exact in float32. A vector with an
element that is no finite number has scale NaN, which makes its estimates NaN.
"""

import torch

#: Makes up for the rounding of a few float32 operations.
MARGIN = 1 + 2**-20
TOP = 255
LEAST_SCALE = 2.0**-126


def round_up(x: torch.Tensor) -> torch.Tensor:
    """Smallest bfloat16 that is no less than x (float32, no negative numbers); NaN stays."""
    bits = ((x.view(torch.int32) + 0xFFFF) >> 16) << 16
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def round_down(x: torch.Tensor) -> torch.Tensor:
    """Largest bfloat16 that is no more than x (float32); NaN stays."""
    bits = x.view(torch.int32)
    bits = (torch.where(x < 0, bits + 0xFFFF, bits) >> 16) << 16
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def half_width(low: torch.Tensor, high: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Half width of a box around the stored ``centre`` that contains [low, high] (float32)."""
    return torch.maximum(high - centre, centre - low) * MARGIN


def encode(x: torch.Tensor, up: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D] and affine bfloat16 [..., 2] (scale, zero) of x float32 [..., D].

    Elements are rounded to the nearest code or, if ``up``, to one that is no less, up to a few
    units in the last place of float32.
    """
    zero = round_down(x.amin(-1, keepdim=True))
    span = x.amax(-1, keepdim=True) - zero.float()
    scale = round_up((span / TOP * MARGIN).clamp(min=LEAST_SCALE))
    scale = scale.masked_fill(~scale.isfinite(), float("nan"))
    position = (x - zero.float()) / scale.float()
    codes = (position.ceil() if up else position.round()).nan_to_num(0.0).clamp(0, TOP)
    return codes.to(torch.uint8), torch.cat([scale, zero], -1)


def decode(codes: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] of what :func:`encode` returned."""
    scale, zero = affine.float().split(1, -1)
    return zero + scale * codes.float()


def pack(
    parts: list[torch.Tensor], kind: str, bits: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is stored of a summary.

    Args:
        parts: float32 [..., D], the vectors of ``kind``; of ``box`` its low and high ends, which
            are rounded outward.
        bits: 8 or 16.

    Returns:
        bfloat16 [..., vectors, D] and ``None``, or codes uint8 [..., vectors, D] and affine
        bfloat16 [..., vectors, 2].
    """
    if bits == 16:
        if kind == "box":
            low, high = parts
            centre = ((low + high) / 2).to(torch.bfloat16)
            return torch.stack([centre, round_up(half_width(low, high, centre.float()))], -2), None
        return torch.stack([part.to(torch.bfloat16) for part in parts], -2), None
    if kind == "box":
        low, high = parts
        centre, affine = encode((low + high) / 2)
        box = [(centre, affine), encode(half_width(low, high, decode(centre, affine)), up=True)]
        codes, affines = zip(*box, strict=True)
    else:
        codes, affines = zip(*map(encode, parts), strict=True)
    return torch.stack(codes, -2), torch.stack(affines, -2)


def load(summary: torch.Tensor, affine: torch.Tensor | None, pages: torch.Tensor) -> torch.Tensor:
    """float32 [*pages, Hkv, vectors, D] of the stored summaries of ``pages``."""
    stored = summary[pages]
    return stored.float() if affine is None else decode(stored, affine[pages])
