"""Triton kernel of candidate pages."""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_rank import FIRST_KEY, NO_PAGE, keys_behind, largest, ordered
from sgl_psa_kernels.triton_tiles import finite


@triton.jit
def usable_estimates(log_mass, r, g, M, n, start, G: tl.constexpr, BLOCK: tl.constexpr):
    """Estimates [GT, BLOCK] of a block of pages, and which of them are numbers below +inf."""
    page = start + tl.arange(0, BLOCK)
    x = tl.load(
        log_mass + (r * G + g)[:, None] * M + page[None, :],
        mask=(g < G)[:, None] & (page < n)[None, :],
        other=float("inf"),
    )
    # NaN is not below infinity either.
    usable = x < float("inf")
    return tl.where(usable, x, float("-inf")), usable


@triton.jit
def choose(
    log_mass, seq_lens, active, key, flags, chosen, M, count,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Flags [R, M] and number [R] of the ``count`` pages of a pair with the largest shares, by
    bisection; ``key`` int32 [R, M] is scratch. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    b = r // HKV
    n = (tl.load(seq_lens + b) + PAGE - 1) // PAGE
    n = tl.where(tl.load(active + b) != 0, tl.minimum(n, M), 0)
    g = tl.arange(0, GT)
    top = tl.full([GT], float("-inf"), tl.float32)
    total = tl.zeros([GT], tl.float32)
    for start in range(0, n, BLOCK):
        x, _ = usable_estimates(log_mass, r, g, M, n, start, G, BLOCK)
        new = tl.maximum(top, tl.max(x, 1))
        base = finite(new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = new
    whole = finite(finite(top) + tl.log(total))
    there = n * 0
    for start in range(0, n, BLOCK):
        page = start + tl.arange(0, BLOCK)
        x, usable = usable_estimates(log_mass, r, g, M, n, start, G, BLOCK)
        known = tl.max(usable.to(tl.int32), 0) > 0
        share = ordered(tl.max(x - whole[:, None], 0))
        tl.store(key + r * M + page, tl.where(known, share, NO_PAGE), mask=page < n)
        there += tl.sum(known.to(tl.int32), 0)
    tl.debug_barrier()
    wanted = tl.minimum(there, count)
    low = n * 0 + FIRST_KEY
    equal = n * 0
    if wanted > 0:
        low, equal = largest(key, r * M, n, wanted, there, FIRST_KEY, -1, BLOCK)
    ties = n * 0
    for start in range(0, M, BLOCK):
        page, x = keys_behind(key, r * M, n, start, FIRST_KEY, -1, BLOCK)
        tie = (x == low).to(tl.int32)
        take = (x > low) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= equal))
        tl.store(flags + r * M + page, take.to(tl.uint8), mask=page < M)
        ties += tl.sum(tie, 0)
    tl.store(chosen + r, wanted)
