"""Triton kernel of the groups of progressive decode that one program a row and KV head attends."""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_attend import attend_tile, listed_tokens, union
from sgl_psa_kernels.progressive_decode.triton_order import pick_group
from sgl_psa_kernels.progressive_decode.triton_select import (
    COVERAGE,
    group_size,
    kappa_now,
    load_progress,
    lower_bound,
    store_progress,
)
from sgl_psa_kernels.triton_tiles import (
    add_moments,
    correction,
    finite,
    load_moments,
    log_add,
    page_masses,
    store_moments,
)


@triton.jit
def rounds(
    q, k, v, page_table, seq_lens, place_of, codes, arena, log_mass,
    mode, threshold, kappa_floor, kappa_std, kappa_start,
    key, found, order, suffix, lse, total, latest, seen, scored, state, group_count,
    listed, state_out, attended, out, kappa_out, residuals,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row, M,
    group_pages, group_percent, wide, scale,
    SMALL: tl.constexpr, GROUPED: tl.constexpr, STARTED: tl.constexpr,
    ESTIMATES: tl.constexpr, TOLD: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PART: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, TIERED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Groups of the rows that go on, one after the other. Grid (R,).

    ``SMALL``: those of fewer than ``wide`` pages; then what comes next is left as
    :func:`~.triton_select.next_group` expects it, ``group_count`` 0 where the rule has stopped.
    Otherwise all that are left, and the result.

    ``GROUPED``: groups have been attended before; a row goes on if its ``group_count`` is not 0.
    """
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    g = tl.arange(0, GT)
    real = g < G
    heads = r * G + g
    dims = tl.arange(0, DT)
    tile = real[:, None] & (dims < D)[None, :]
    top = tl.load(lse + heads, mask=real, other=0.0)
    acc = tl.load(state_out + heads[:, None] * D + dims[None, :], mask=tile, other=0.0)
    kappa = tl.zeros([GT], tl.float32)
    if ESTIMATES:
        total_now = tl.where(top == float("-inf"), 0.0, 1.0)
        rule = tl.load(mode + b)
        limit = tl.load(threshold + b)
        deviations = tl.load(kappa_std + b)
        left = tl.load(scored + r)
        length = tl.load(seq_lens + b)
        n = (length + PAGE - 1) // PAGE
        token = tl.arange(0, PAGES * PART)
        rows = q + b * q_row + (h * G + g)[:, None] * q_head + dims[None, :]
        query = tl.load(rows, mask=tile, other=0.0).to(DOT)
        whole = tl.load(total + heads, mask=real, other=0.0)
        cursor, count, behind, passed, done = load_progress(state, r)
        if GROUPED:
            left = tl.where(tl.load(group_count + r) > 0, left, 0)
        size = group_size(done, n, group_pages, group_percent)
        compare = rule >= COVERAGE
        lowest = lower_bound(kappa_floor, kappa_start, b, heads, real, STARTED)
        kappa = kappa_now(
            rule, passed, latest, seen, deviations, lowest, heads, real, G, STARTED
        )  # fmt: skip
        moments = r * 3 * G + g
        number, mean, square = load_moments(seen + moments, real, G)
        more = left > 0
        going = more
        if SMALL:
            going = more & (size < wide)
        while going:
            now = finite(top) + tl.log(total_now)
            gap = tl.max(tl.where(real, whole - now, 0.0), 0)
            taken, cursor, count, behind = pick_group(
                log_mass, key, found, order, suffix, listed, attended,
                r, g, M, n, left, rule, limit, now, gap, kappa, size,
                cursor, count, behind, G, GT, WINDOW, STEP, BLOCK,
            )  # fmt: skip
            more = taken > 0
            if more:
                tl.debug_barrier()
                passed += 1
                done += taken
                new_number = tl.zeros([GT], tl.float32)
                new_mean = tl.zeros([GT], tl.float32)
                new_square = tl.zeros([GT], tl.float32)
                for first in range(0, taken, PAGES):
                    inside, own, begin = listed_tokens(
                        listed + r * M, page_table + b * table_row, place_of, first, taken, token,
                        PAGE, PART, TIERED,
                    )  # fmt: skip
                    mass = tl.full([GT, PAGES], float("-inf"), tl.float32)
                    for part in range(PAGE // PART):
                        offset = part * PART + token % PART
                        live = inside & (own * PAGE + offset < length)
                        logits, top, total_now, acc = attend_tile(
                            query, k, v, codes, begin, offset, live, arena, h, k_head, k_slot,
                            v_head, v_slot, dims, scale, top, total_now, acc,
                            HKV, D, PAGE, PAGES, PART, TIERED, INT8, DOT, PRECISION,
                        )  # fmt: skip
                        if compare:
                            mass = log_add(mass, page_masses(logits, PAGES, PART))
                    if compare:
                        spot = first + tl.arange(0, PAGES)
                        page = tl.load(listed + r * M + spot, mask=spot < taken, other=0)
                        estimate = tl.load(
                            log_mass + heads[:, None] * M + page[None, :],
                            mask=real[:, None] & (spot < taken)[None, :],
                            other=float("-inf"),
                        )
                        known = (spot < taken)[None, :] & (estimate > float("-inf"))
                        new_number, new_mean, new_square = add_moments(
                            new_number, new_mean, new_square, mass - estimate, known
                        )
                if compare:
                    number, mean, square = union(
                        number, mean, square, new_number, new_mean, new_square
                    )
                    if rule == COVERAGE:
                        kappa = correction(new_number, new_mean, new_square, deviations, lowest)
                    else:
                        kappa = correction(number, mean, square, deviations, lowest)
                    if SMALL:
                        store_moments(latest + moments, new_number, new_mean, new_square, real, G)
                tl.debug_barrier()
                size = group_size(done, n, group_pages, group_percent)
            going = more
            if SMALL:
                going = more & (size < wide)
        acc = acc / tl.where(total_now > 0, total_now, 1.0)[:, None]
        top = finite(top) + tl.log(total_now)
        store_progress(state, r, cursor, count, behind, passed, done)
        if SMALL:
            tl.store(group_count + r, more.to(tl.int32))
            store_moments(seen + moments, number, mean, square, real, G)
        elif TOLD:
            at = residuals + heads * 3
            tl.store(at, tl.where(compare, number, 0.0), mask=real)
            tl.store(at + 1, tl.where(compare, number * mean, 0.0), mask=real)
            both = square + number * mean * mean
            tl.store(at + 2, tl.where(compare, both, 0.0), mask=real)
    tl.store(lse + heads, top, mask=real)
    if SMALL:
        tl.store(state_out + heads[:, None] * D + dims[None, :], acc, mask=tile)
    else:
        tl.store(out + heads[:, None] * D + dims[None, :], acc, mask=tile)
        tl.store(kappa_out + heads, kappa, mask=real)
