"""Triton functions that put pages in order, a window at a time, without sorting all of them.

The next WINDOW pages of a pair are found by bisection on integers in the order of the floats, and
ranked by counting. A window that is used up is followed by the next: few rows ever need a second.

Per pair r: ``key`` int32 [R, M]; ``found`` int32 [R, 2, WINDOW], page and key of the window's pages
in the order of pages, and ``order`` of the same shape in falling order of keys, the lower page
first among equals; ``suffix`` float32 [R, G, WINDOW + 1], the estimated log mass of what is left
from a place of the window on.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_rank import FIRST_KEY, NO_PAGE, keys_behind, largest, number
from sgl_psa_kernels.triton_tiles import finite, log_add

COVERAGE = tl.constexpr(2)


@triton.jit
def fill_window(
    key, found, order, r, M, n, there, bound_key, bound_page,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the next pages behind the bound in order; returns their number. ``there``: how many are
    left, at least 1."""
    wanted = tl.minimum(there, WINDOW)
    low, equal = largest(key, r * M, n, wanted, there, bound_key, bound_page, BLOCK)
    pages = found + r * 2 * WINDOW
    tl.debug_barrier()
    taken = n * 0
    ties = n * 0
    for start in range(0, n, BLOCK):
        page, x = keys_behind(key, r * M, n, start, bound_key, bound_page, BLOCK)
        tie = (x == low).to(tl.int32)
        chosen = ((x > low) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= equal))).to(tl.int32)
        place = taken + tl.cumsum(chosen, 0) - 1
        tl.store(pages + place, page, mask=chosen > 0)
        tl.store(pages + WINDOW + place, x, mask=chosen > 0)
        taken += tl.sum(chosen, 0)
        ties += tl.sum(tie, 0)
    tl.debug_barrier()
    i = tl.arange(0, WINDOW)
    mine = tl.load(pages + WINDOW + i, mask=i < wanted, other=NO_PAGE)
    rank = tl.zeros([WINDOW], tl.int32)
    for start in range(0, wanted, 16):
        j = start + tl.arange(0, 16)
        other = tl.load(pages + WINDOW + j, mask=j < wanted, other=NO_PAGE)
        ahead = (other[None, :] > mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        )
        rank += tl.sum((ahead & (j < wanted)[None, :]).to(tl.int32), 1)
    to = order + r * 2 * WINDOW + rank
    tl.store(to, tl.load(pages + i, mask=i < wanted, other=0), mask=i < wanted)
    tl.store(to + WINDOW, mine, mask=i < wanted)
    tl.debug_barrier()
    return wanted


@triton.jit
def fill_suffix(
    log_mass, key, order, suffix, r, g, M, n, count,
    G: tl.constexpr, GT: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a window, each formed from its own terms: no difference of large sums, and no
    underflow, so that a threshold of 0 attends every page."""
    SPAN: tl.constexpr = BLOCK if BLOCK * GT <= 4096 else 4096 // GT
    last = order + r * 2 * WINDOW + count - 1
    bound_page = tl.load(last)
    bound_key = tl.load(last + WINDOW)
    top = tl.full([GT], float("-inf"), tl.float32)
    total = tl.zeros([GT], tl.float32)
    for start in range(0, n, SPAN):
        page, x = keys_behind(key, r * M, n, start, bound_key, bound_page, SPAN)
        estimate = tl.load(
            log_mass + (r * G + g)[:, None] * M + page[None, :],
            mask=(g < G)[:, None] & (x != NO_PAGE)[None, :],
            other=float("-inf"),
        )
        new = tl.maximum(top, tl.max(estimate, 1))
        base = finite(new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(estimate - base[:, None]), 1)
        top = new
    behind = finite(top) + tl.log(total)
    i = tl.arange(0, WINDOW)
    page = tl.load(order + r * 2 * WINDOW + i, mask=i < count, other=0)
    estimate = tl.load(
        log_mass + (r * G + g)[:, None] * M + page[None, :],
        mask=(g < G)[:, None] & (i < count)[None, :],
        other=float("-inf"),
    )
    sums = tl.associative_scan(estimate, 1, log_add, reverse=True)
    sums = log_add(sums, tl.broadcast_to(behind[:, None], sums.shape))
    to = suffix + (r * G + g) * (WINDOW + 1)
    tl.store(to[:, None] + i[None, :], sums, mask=(g < G)[:, None])
    tl.store(to + WINDOW, behind, mask=g < G)
    tl.debug_barrier()


@triton.jit
def next_window(
    log_mass, key, found, order, suffix, r, g, M, n, there, bound_key, bound_page, rule,
    G: tl.constexpr, GT: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A window and, for a coverage rule, its sums; returns the number of its pages."""
    count = fill_window(key, found, order, r, M, n, there, bound_key, bound_page, WINDOW, BLOCK)
    if rule >= COVERAGE:
        fill_suffix(log_mass, key, order, suffix, r, g, M, n, count, G, GT, WINDOW, BLOCK)
    return count


@triton.jit
def worth_looking(order, r, cursor, count, gap, limit, WINDOW: tl.constexpr):
    """Whether a page from place ``cursor`` on can hold more than the bar of the marginal rule.

    A page's estimate over the mass attended is no more than its key plus ``gap``, the largest log
    of (all mass over mass attended) of any head. The margin covers rounding.
    """
    at = order + (r * 2 + 1) * WINDOW + cursor
    bound = number(tl.load(at, mask=cursor < count, other=NO_PAGE + 0x800000)) + gap
    return bound + 1e-3 + 1e-5 * tl.abs(gap) > limit


@triton.jit
def uncovered(suffix, r, g, G: tl.constexpr, WINDOW: tl.constexpr, cursor, kappa, bar):
    """In how many heads the estimated rest from place ``cursor`` on is above the bar."""
    at = suffix + (r * G + g) * (WINDOW + 1) + cursor
    rest = tl.load(at, mask=g < G, other=float("-inf"))
    return tl.sum(((rest + kappa > bar) & (g < G)).to(tl.int32), 0)


@triton.jit
def pick_group(
    log_mass, key, found, order, suffix, listed, attended,
    r, g, M, n, scored, rule, limit, lse, gap, kappa, size, cursor, count, behind,
    G: tl.constexpr, GT: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The next group of at most ``size`` pages, put into ``listed`` [R, M] and marked in
    ``attended``; none if the rule stops.

    Args:
        lse, kappa: [GT], of what is attended; ``gap``: the largest log of all mass over it.
        cursor, count, behind: place in the window, its pages, and pages in windows before it; all
            0 before the first.

    Returns:
        Number of pages, and the new cursor, count and behind. A page that is passed over is never
        wanted again, because what is attended only grows.
    """
    bar = tl.where(g < G, lse + limit, float("inf"))
    taken = n * 0
    going = (behind + cursor < scored) & (size > 0)
    while going:
        if cursor >= count:
            bound_key = n * 0 + FIRST_KEY
            bound_page = n * 0 - 1
            if count > 0:
                end = order + r * 2 * WINDOW + count - 1
                bound_page = tl.load(end)
                bound_key = tl.load(end + WINDOW)
            behind += count
            count = next_window(
                log_mass, key, found, order, suffix, r, g, M, n, scored - behind,
                bound_key, bound_page, rule, G, GT, WINDOW, BLOCK,
            )  # fmt: skip
            cursor = cursor * 0
        if rule < COVERAGE:
            going = worth_looking(order, r, cursor, count, gap, limit, WINDOW)
        elif taken == 0:
            going = uncovered(suffix, r, g, G, WINDOW, cursor, kappa, bar) > 0
        if going:
            at = cursor + tl.arange(0, STEP)
            inside = at < count
            page = tl.load(order + r * 2 * WINDOW + at, mask=inside, other=0)
            wanted = inside
            if rule < COVERAGE:
                estimate = tl.load(
                    log_mass + (r * G + g)[:, None] * M + page[None, :],
                    mask=(g < G)[:, None] & inside[None, :],
                    other=float("-inf"),
                )
                wanted = tl.max((estimate > bar[:, None]).to(tl.int32), 0) > 0
            rank = taken + tl.cumsum(wanted.to(tl.int32), 0)
            take = wanted & (rank <= size)
            tl.store(listed + r * M + rank - 1, page, mask=take)
            tl.store(attended + r * M + page, tl.full([STEP], 1, tl.uint8), mask=take)
            last = tl.max(tl.where(take, at, -1), 0)
            taken += tl.sum(take.to(tl.int32), 0)
            full = taken >= size
            cursor = tl.where(full, last + 1, tl.minimum(cursor + STEP, count))
            going = (full == 0) & (behind + cursor < scored)
    return taken, cursor, count, behind
