"""Kinds of page summaries: what is stored of a page, and which estimate it gives.

With x the scaled query and n the page's tokens, the estimates of a page's log mass are

mean         log n + x . mean                                   a lower bound (Jensen)
gaussian     log n + x . mean + 0.5 sum x^2 variance            second-order cumulant
cuboid_mean  x . centre + sum |x| radius                        ArkVale (NeurIPS 2024)
box          log n + x . centre + sum |x| half width            an upper bound: Quest (ICML 2024)
hybrid       logaddexp(gaussian, cuboid_mean)
"""

import torch

#: kind -> vectors stored, in this order: mean, variance, box centre, then radius (mean
#: |k - centre|) or, for box, half width.
VECTORS: dict[str, int] = {"hybrid": 4, "mean": 1, "gaussian": 2, "cuboid_mean": 2, "box": 2}


def round_up(x: torch.Tensor) -> torch.Tensor:
    """Smallest bfloat16 that is no less than x (float32, no negative numbers); NaN stays."""
    bits = ((x.view(torch.int32) + 0xFFFF) >> 16) << 16
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def outward(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 centre and half width of a box that contains [low, high] (float32).

    The factor makes up for the rounding of the subtractions.
    """
    centre = ((low + high) / 2).to(torch.bfloat16)
    middle = centre.float()
    return centre, round_up(torch.maximum(high - middle, middle - low) * (1 + 2**-20))
