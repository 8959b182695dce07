"""Kinds of page summaries: what is stored of a page, and which estimate it gives.

With x the scaled query and n the page's tokens, the estimates of a page's log mass are

mean         log n + x . mean                                   a lower bound (Jensen)
gaussian     log n + x . mean + 0.5 sum x^2 variance            second-order cumulant
cuboid_mean  x . centre + sum |x| radius                        ArkVale (NeurIPS 2024)
box          log n + x . centre + sum |x| half width            an upper bound: Quest (ICML 2024)
hybrid       logaddexp(gaussian, cuboid_mean)
"""

#: kind -> vectors stored, in this order: mean, variance, box centre, then radius (mean
#: |k - centre|) or, for box, half width.
VECTORS: dict[str, int] = {"hybrid": 4, "mean": 1, "gaussian": 2, "cuboid_mean": 2, "box": 2}
