"""Triton kernel of the groups of progressive decode that one program a row and KV head attends."""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_attend import attend_tile, first_slot, union
from sgl_psa_kernels.progressive_decode.triton_order import pick_group
from sgl_psa_kernels.progressive_decode.triton_select import (
    BEHIND,
    COLUMNS,
    COUNT,
    COVERAGE,
    CURSOR,
    DONE,
    PASSED,
    group_size,
    kappa_now,
    lower_bound,
)
from sgl_psa_kernels.triton_tiles import add_moments, correction, finite, log_add, page_masses


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
        cursor = tl.load(state + r * COLUMNS + CURSOR)
        count = tl.load(state + r * COLUMNS + COUNT)
        behind = tl.load(state + r * COLUMNS + BEHIND)
        passed = tl.load(state + r * COLUMNS + PASSED)
        done = tl.load(state + r * COLUMNS + DONE)
        if GROUPED:
            left = tl.where(tl.load(group_count + r) > 0, left, 0)
        size = group_size(done, n, group_pages, group_percent)
        compare = rule >= COVERAGE
        lowest = lower_bound(kappa_floor, kappa_start, b, heads, real, STARTED)
        kappa = kappa_now(
            rule, passed, latest, seen, deviations, lowest, heads, real, G, STARTED
        )  # fmt: skip
        at = seen + r * 3 * G + g
        number = tl.load(at, mask=real, other=0.0)
        mean = tl.load(at + G, mask=real, other=0.0)
        square = tl.load(at + 2 * G, mask=real, other=0.0)
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
                    place = first + token // PART
                    own = tl.load(listed + r * M + place, mask=place < taken, other=0)
                    frame = tl.load(page_table + b * table_row + own, mask=place < taken, other=0)
                    begin = first_slot(frame, place_of, place < taken, PAGE, TIERED)
                    mass = tl.full([GT, PAGES], float("-inf"), tl.float32)
                    for part in range(PAGE // PART):
                        offset = part * PART + token % PART
                        live = (place < taken) & (own * PAGE + offset < length)
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
                        at = latest + r * 3 * G + g
                        tl.store(at, new_number, mask=real)
                        tl.store(at + G, new_mean, mask=real)
                        tl.store(at + 2 * G, new_square, mask=real)
                tl.debug_barrier()
                size = group_size(done, n, group_pages, group_percent)
            going = more
            if SMALL:
                going = more & (size < wide)
        acc = acc / tl.where(total_now > 0, total_now, 1.0)[:, None]
        top = finite(top) + tl.log(total_now)
        tl.store(state + r * COLUMNS + PASSED, passed)
        if SMALL:
            tl.store(state + r * COLUMNS + CURSOR, cursor)
            tl.store(state + r * COLUMNS + COUNT, count)
            tl.store(state + r * COLUMNS + BEHIND, behind)
            tl.store(state + r * COLUMNS + DONE, done)
            tl.store(group_count + r, more.to(tl.int32))
            at = seen + r * 3 * G + g
            tl.store(at, number, mask=real)
            tl.store(at + G, mean, mask=real)
            tl.store(at + 2 * G, square, mask=real)
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
