"""Triton kernels of progressive decode that read estimates, not keys.

Tensors are per pair r of row and KV head, r = row * HKV + head; log_mass is [R, G, M] in memory.
Pages are logical.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_tiles import correction, finite, log_add, log_sum

MARGINAL = tl.constexpr(1)
COVERAGE = tl.constexpr(2)
CONSERVATIVE = tl.constexpr(3)


@triton.jit
def survey(
    log_mass, mode, seq_lens,
    forced, forced_count, scored, stale_count, rest, attended,
    M, sink_pages, recent_pages,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr,
    ESTIMATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forced pages in order, their number, and the log mass [R, G] that the others are estimated
    to hold. ``attended`` [R, M] becomes 1 for forced pages, 0 for all others. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    n = (tl.load(seq_lens + r // HKV) + PAGE - 1) // PAGE
    sparse = tl.load(mode + r // HKV) != 0
    g = tl.arange(0, GT)
    top = tl.full([GT], float("-inf"), tl.float32)
    total = tl.zeros([GT], tl.float32)
    count = n * 0
    stale_pages = n * 0
    for start in range(0, M, BLOCK):
        page = start + tl.arange(0, BLOCK)
        exists = page < n
        heads = (g < G)[:, None] & (exists & sparse)[None, :]
        if ESTIMATES:
            at = log_mass + (r * G + g)[:, None] * M + page[None, :]
            estimate = tl.load(at, mask=heads, other=0.0)
        else:
            estimate = tl.where(heads, float("inf"), 0.0)
        # NaN is not below infinity either.
        stale = tl.max(tl.where(estimate < float("inf"), 0, 1), 0) > 0
        edge = (page < sink_pages) | (page >= n - recent_pages)
        chosen = ((edge | stale | (sparse == 0)) & exists).to(tl.int32)
        others = tl.where(heads & (chosen == 0)[None, :], estimate, float("-inf"))
        new = tl.maximum(top, tl.max(others, 1))
        base = finite(new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(others - base[:, None]), 1)
        top = new
        place = count + tl.cumsum(chosen, 0) - 1
        tl.store(forced + r * M + place, page, mask=chosen > 0)
        tl.store(attended + r * M + page, chosen.to(tl.uint8), mask=page < M)
        count += tl.sum(chosen, 0)
        stale_pages += tl.sum(stale.to(tl.int32), 0)
    tl.store(forced_count + r, count)
    tl.store(scored + r, n - count)
    tl.store(stale_count + r, stale_pages)
    tl.store(rest + r * G + g, finite(top) + tl.log(total), mask=g < G)


@triton.jit
def keys(
    log_mass, mode, seq_lens, attended, lse, rest, total, key, M,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort keys [R, M]: a page's largest normalised estimate of any head. -inf where there is
    nothing to choose; pages to choose from have more. Grid (R, blocks of pages)."""
    r = tl.program_id(0).to(tl.int64)
    n = (tl.load(seq_lens + r // HKV) + PAGE - 1) // PAGE
    sparse = tl.load(mode + r // HKV) != 0
    g = tl.arange(0, GT)
    whole = log_add(
        tl.load(lse + r * G + g, mask=g < G, other=0.0),
        tl.load(rest + r * G + g, mask=g < G, other=0.0),
    )
    tl.store(total + r * G + g, whole, mask=g < G)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    open_ = (page < n) & sparse
    open_ = open_ & (tl.load(attended + r * M + page, mask=open_, other=1) == 0)
    at = log_mass + (r * G + g)[:, None] * M + page[None, :]
    estimate = tl.load(at, mask=(g < G)[:, None] & open_[None, :], other=float("-inf"))
    best = tl.max(estimate - whole[:, None], 0)
    best = tl.where(open_, tl.maximum(best, -3.0e38), float("-inf"))
    tl.store(key + r * M + page, best, mask=page < M)


@triton.jit
def suffix_masses(
    log_mass, mode, scored, order, suffix, M,
    HKV: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """suffix [R, G, M]: the estimated log mass of the pages from a place of ``order`` on. Only for
    rows with a coverage rule. Grid (R, G).

    Every sum is formed from its own terms: no difference of large sums, and no underflow, so that a
    threshold of 0 attends every page.
    """
    r = tl.program_id(0).to(tl.int64)
    count = tl.load(scored + r)
    rule = tl.load(mode + r // HKV)
    count = tl.where((rule == COVERAGE) | (rule == CONSERVATIVE), count, 0)
    head = r * G + tl.program_id(1)
    carry = tl.full([1], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        at = count - 1 - start - tl.arange(0, BLOCK)
        page = tl.load(order + r * M + at, mask=at >= 0, other=0)
        estimate = tl.load(log_mass + head * M + page, mask=at >= 0, other=float("-inf"))
        sums = log_add(tl.associative_scan(estimate, 0, log_add), carry)
        tl.store(suffix + head * M + at, sums, mask=at >= 0)
        everything = log_sum(estimate[None, :])
        carry = log_add(carry, everything)


@triton.jit
def first_group(
    log_mass, mode, threshold, kappa_floor, kappa_std, first_pages, order, key, suffix,
    lse, total, moments, forced_count, scored,
    group, group_count, group_end, attended,
    M, group_pages,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first group, as large as predicted: its pages in order, their number (0: the rule stops
    at once), and the place in ``order`` behind the last page looked at. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    rule = tl.load(mode + r // HKV)
    limit = tl.load(threshold + r // HKV)
    left = tl.load(scored + r)
    predicted = tl.load(first_pages + r).to(tl.int64) - tl.load(forced_count + r)
    size = tl.maximum(predicted, group_pages)
    g = tl.arange(0, GT)
    real = g < G
    mass = tl.load(lse + r * G + g, mask=real, other=0.0)
    bar = tl.where(real, mass + limit, float("inf"))
    whole = tl.load(total + r * G + g, mask=real, other=0.0)
    gap = tl.max(tl.where(real, whole - mass, 0.0), 0)
    if ((rule == COVERAGE) | (rule == CONSERVATIVE)) & (left > 0):
        kappa = tl.zeros([GT], tl.float32)
        if rule == CONSERVATIVE:
            known = moments + r * 3 * G + g
            kappa = correction(
                tl.load(known, mask=real, other=0.0),
                tl.load(known + G, mask=real, other=0.0),
                tl.load(known + 2 * G, mask=real, other=0.0),
                tl.load(kappa_std + r // HKV),
                tl.load(kappa_floor + r // HKV),
            )
        if uncovered(suffix, r, g, G, M, 0, kappa, mass + limit) == 0:
            left = left * 0
    taken = left * 0
    cursor = left * 0
    going = left > 0
    while going:
        at = cursor + tl.arange(0, BLOCK)
        inside = at < left
        page = tl.load(order + r * M + at, mask=inside, other=0)
        wanted = inside
        if rule == MARGINAL:
            estimate = tl.load(
                log_mass + (r * G + g)[:, None] * M + page[None, :],
                mask=real[:, None] & inside[None, :],
                other=float("-inf"),
            )
            wanted = tl.max((estimate > bar[:, None]).to(tl.int32), 0) > 0
        rank = taken + tl.cumsum(wanted.to(tl.int32), 0)
        take = wanted & (rank <= size)
        tl.store(group + r * M + rank - 1, page, mask=take)
        tl.store(attended + r * M + page, tl.full([BLOCK], 1, tl.uint8), mask=take)
        last = tl.max(tl.where(take, at, -1), 0)
        taken += tl.sum(take.to(tl.int32), 0)
        full = taken >= size
        cursor = tl.where(full, last + 1, tl.minimum(cursor + BLOCK, left))
        going = (cursor < left) & (full == 0)
        if rule == MARGINAL:
            going = going & worth_looking(key + r * M, cursor, left, gap, limit)
    tl.store(group_count + r, taken)
    tl.store(group_end + r, cursor)


@triton.jit
def worth_looking(key, cursor, left, gap, limit):
    """Whether a page from place ``cursor`` on can hold more than the bar of the marginal rule.

    A page's estimate over the mass attended is no more than its key plus ``gap``, the largest log
    of (all mass over mass attended) of any head. The margin covers rounding.
    """
    bound = tl.load(key + cursor, mask=cursor < left, other=float("-inf")) + gap
    return bound + 1e-3 + 1e-5 * tl.abs(gap) > limit


@triton.jit
def uncovered(suffix, r, g, G: tl.constexpr, M, cursor, kappa, bar):
    """In how many heads the estimated rest from place ``cursor`` on is above the bar."""
    at = suffix + (r * G + g) * M + cursor
    rest = tl.load(at, mask=g < G, other=float("-inf"))
    return tl.sum(((rest + kappa > bar) & (g < G)).to(tl.int32), 0)


@triton.jit
def statistics(
    log_mass, mode, seq_lens, attended, lse, kappa, scored, stale_count, rounds, stats, M,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr,
    ESTIMATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of STAT_NAMES, float32 [R, 6]. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + r // HKV)
    n = (length + PAGE - 1) // PAGE
    sparse = tl.load(mode + r // HKV) != 0
    g = tl.arange(0, GT)
    top = tl.full([GT], float("-inf"), tl.float32)
    total = tl.zeros([GT], tl.float32)
    pages = n * 0
    tokens = n * 0
    for start in range(0, n, BLOCK):
        page = start + tl.arange(0, BLOCK)
        exists = page < n
        read = (tl.load(attended + r * M + page, mask=exists, other=0) != 0) & exists
        pages += tl.sum(read.to(tl.int32), 0)
        tokens += tl.sum(tl.where(read, tl.minimum(length - page * PAGE, PAGE), 0), 0)
        if ESTIMATES:
            heads = (g < G)[:, None] & (exists & (read == 0) & sparse)[None, :]
            at = log_mass + (r * G + g)[:, None] * M + page[None, :]
            estimate = tl.load(at, mask=heads, other=float("-inf"))
            new = tl.maximum(top, tl.max(estimate, 1))
            base = finite(new)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(estimate - base[:, None]), 1)
            top = new
    left = finite(top) + tl.log(total)
    left += tl.load(kappa + r * G + g, mask=g < G, other=0.0)
    lead = left - tl.load(lse + r * G + g, mask=(g < G) & (n > 0), other=0.0)
    coverage = tl.min(tl.where((g < G) & (total > 0), 1.0 / (1.0 + tl.exp(lead)), 1.0), 0)
    live = (n > 0).to(tl.float32)
    at = stats + r * 6
    tl.store(at, pages.to(tl.float32))
    tl.store(at + 1, tokens.to(tl.float32))
    tl.store(at + 2, tl.load(scored + r).to(tl.float32))
    tl.store(at + 3, tl.load(rounds + r).to(tl.float32))
    tl.store(at + 4, coverage * live)
    tl.store(at + 5, tl.load(stale_count + r).to(tl.float32))
