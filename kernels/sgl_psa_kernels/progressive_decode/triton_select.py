"""Triton kernels of progressive decode that read estimates, not keys.

Tensors are per pair r of row and KV head, r = row * HKV + head; log_mass is [R, G, M] in memory.
Pages are logical.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_order import pick_group
from sgl_psa_kernels.triton_rank import NO_PAGE, ordered
from sgl_psa_kernels.triton_tiles import correction, finite, load_moments, log_add

MARGINAL = tl.constexpr(1)
COVERAGE = tl.constexpr(2)
CONSERVATIVE = tl.constexpr(3)

#: The state int32 [R, COLUMNS] between launches: place in the window, its pages, pages in windows
#: before it, rounds taken, all 0 before the first group; pages attended.
COLUMNS = tl.constexpr(8)
CURSOR = tl.constexpr(0)
COUNT = tl.constexpr(1)
BEHIND = tl.constexpr(2)
PASSED = tl.constexpr(3)
DONE = tl.constexpr(4)


@triton.jit
def load_progress(state, r):
    """The state of a pair: cursor, count, behind, passed and done."""
    at = state + r * COLUMNS
    return (
        tl.load(at + CURSOR),
        tl.load(at + COUNT),
        tl.load(at + BEHIND),
        tl.load(at + PASSED),
        tl.load(at + DONE),
    )


@triton.jit
def store_progress(state, r, cursor, count, behind, passed, done):
    """Put the state of a pair where :func:`load_progress` finds it."""
    at = state + r * COLUMNS
    tl.store(at + CURSOR, cursor)
    tl.store(at + COUNT, count)
    tl.store(at + BEHIND, behind)
    tl.store(at + PASSED, passed)
    tl.store(at + DONE, done)


@triton.jit
def group_size(done, n, group_pages, group_percent):
    """Pages of the next group of a row of n pages that has attended ``done`` of them."""
    share = tl.minimum(done.to(tl.int64) * group_percent // 100, n).to(tl.int32)
    return tl.maximum(share, group_pages)


@triton.jit
def survey(
    log_mass, mode, seq_lens,
    forced, forced_count, scored, stale_count, rest, attended, state,
    M, sink_pages, recent_pages,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr,
    ESTIMATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forced pages in order, their number, and the log mass [R, G] that the others are estimated
    to hold. ``attended`` [R, M] becomes 1 for forced pages, 0 for the row's others. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    n = (tl.load(seq_lens + r // HKV) + PAGE - 1) // PAGE
    sparse = tl.load(mode + r // HKV) != 0
    g = tl.arange(0, GT)
    top = tl.full([GT], float("-inf"), tl.float32)
    total = tl.zeros([GT], tl.float32)
    count = n * 0
    stale_pages = n * 0
    for start in range(0, n, BLOCK):
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
        tl.store(attended + r * M + page, chosen.to(tl.uint8), mask=exists)
        count += tl.sum(chosen, 0)
        stale_pages += tl.sum(stale.to(tl.int32), 0)
    tl.store(forced_count + r, count)
    tl.store(scored + r, n - count)
    tl.store(stale_count + r, stale_pages)
    tl.store(rest + r * G + g, finite(top) + tl.log(total), mask=g < G)
    column = tl.arange(0, COLUMNS)
    tl.store(state + r * COLUMNS + column, tl.where(column == DONE, count, 0))


@triton.jit
def keys(
    log_mass, mode, seq_lens, attended, lse, rest, total, key, M,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys [R, M]: a page's largest normalised estimate of any head, as an ordered integer; NO_PAGE
    where there is nothing to choose. Grid (R, blocks of pages)."""
    r = tl.program_id(0).to(tl.int64)
    n = (tl.load(seq_lens + r // HKV) + PAGE - 1) // PAGE
    first = tl.program_id(1) * BLOCK
    if (first < n) | (first == 0):
        sparse = tl.load(mode + r // HKV) != 0
        g = tl.arange(0, GT)
        whole = log_add(
            tl.load(lse + r * G + g, mask=g < G, other=0.0),
            tl.load(rest + r * G + g, mask=g < G, other=0.0),
        )
        tl.store(total + r * G + g, whole, mask=(g < G) & (first == 0))
        page = first + tl.arange(0, BLOCK)
        open_ = (page < n) & sparse
        open_ = open_ & (tl.load(attended + r * M + page, mask=open_, other=1) == 0)
        at = log_mass + (r * G + g)[:, None] * M + page[None, :]
        estimate = tl.load(at, mask=(g < G)[:, None] & open_[None, :], other=float("-inf"))
        best = ordered(tl.max(estimate - whole[:, None], 0))
        tl.store(key + r * M + page, tl.where(open_, best, NO_PAGE), mask=page < n)


@triton.jit
def lower_bound(kappa_floor, kappa_start, b, heads, real, STARTED: tl.constexpr):
    """Least correction [GT] of the heads."""
    lowest = tl.where(real, tl.load(kappa_floor + b), 0.0)
    if STARTED:
        lowest = tl.maximum(lowest, tl.load(kappa_start + heads, mask=real, other=0.0))
    return lowest


@triton.jit
def kappa_now(
    rule, passed, latest, seen, deviations, lowest, heads, real, G: tl.constexpr,
    STARTED: tl.constexpr,
):  # fmt: skip
    """The correction [GT] in force after ``passed`` rounds, from the moments [R, 3, G]."""
    kappa = tl.zeros_like(lowest)
    if STARTED:
        if rule == COVERAGE:
            kappa = lowest
    if (rule == CONSERVATIVE) | ((rule == COVERAGE) & (passed > 0)):
        known = seen
        if rule == COVERAGE:
            known = latest
        at = known + heads // G * 3 * G + heads % G
        number, mean, square = load_moments(at, real, G)
        kappa = correction(number, mean, square, deviations, lowest)
    return tl.where(real, kappa, 0.0)


@triton.jit
def next_group(
    log_mass, mode, seq_lens, threshold, kappa_floor, kappa_std, kappa_start, first_pages,
    key, found, order, suffix, lse, total, latest, seen, scored, state,
    group, group_count, attended, M, group_pages, group_percent,
    FIRST: tl.constexpr, PREDICTED: tl.constexpr, STARTED: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next group, to be attended by chunks: its pages and their number, 0 where the rule has
    stopped. ``FIRST``: as large as predicted. Grid (R,)."""
    r = tl.program_id(0).to(tl.int64)
    b = r // HKV
    rule = tl.load(mode + b)
    n = (tl.load(seq_lens + b) + PAGE - 1) // PAGE
    left = tl.load(scored + r)
    g = tl.arange(0, GT)
    real = g < G
    heads = r * G + g
    cursor, count, behind, passed, done = load_progress(state, r)
    size = group_size(done, n, group_pages, group_percent)
    if FIRST:
        if PREDICTED:
            # The prediction may be any integer.
            size = tl.maximum(size, tl.maximum(tl.load(first_pages + r), done) - done)
    else:
        # A group without pages is the last.
        left = tl.where(tl.load(group_count + r) > 0, left, 0)
    mass = tl.load(lse + heads, mask=real, other=0.0)
    whole = tl.load(total + heads, mask=real, other=0.0)
    gap = tl.max(tl.where(real, whole - mass, 0.0), 0)
    lowest = lower_bound(kappa_floor, kappa_start, b, heads, real, STARTED)
    kappa = kappa_now(
        rule, passed, latest, seen, tl.load(kappa_std + b), lowest, heads, real, G, STARTED
    )
    taken, cursor, count, behind = pick_group(
        log_mass, key, found, order, suffix, group, attended,
        r, g, M, n, left, rule, tl.load(threshold + b), mass, gap, kappa, size,
        cursor, count, behind, G, GT, WINDOW, STEP, BLOCK,
    )  # fmt: skip
    tl.store(group_count + r, taken)
    passed += (taken > 0).to(tl.int32)
    store_progress(state, r, cursor, count, behind, passed, done + taken)


@triton.jit
def statistics(
    log_mass, mode, seq_lens, attended, lse, kappa, scored, stale_count, state, stats, M,
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
    tl.store(at + 3, tl.load(state + r * COLUMNS + PASSED).to(tl.float32))
    tl.store(at + 4, coverage * live)
    tl.store(at + 5, tl.load(stale_count + r).to(tl.float32))
