"""Triton kernels of progressive decode that read keys and values.

Lists of pages are attended in chunks whose length follows from the list alone, and the partial
results are merged in a fixed order: a row's result depends neither on the batch nor on the device.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_select import (
    CONSERVATIVE,
    COVERAGE,
    MARGINAL,
    uncovered,
    worth_looking,
)
from sgl_psa_kernels.triton_tiles import (
    absorb,
    add_moments,
    correction,
    finite,
    log_add,
    page_masses,
    tile_logits,
)


@triton.jit
def chunk_pages(count, LEAST: tl.constexpr, PAGES: tl.constexpr, CHUNKS: tl.constexpr):
    """Pages of a chunk of a list of ``count``: whole tiles, at most CHUNKS chunks."""
    pages = tl.maximum((count + CHUNKS - 1) // CHUNKS, LEAST)
    return (pages + PAGES - 1) // PAGES * PAGES


@triton.jit
def attend_list(
    q, k, v, page_table, seq_lens, mode, log_mass, pages, counts,
    part_out, part_lse, part_moments,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row, M, chunks_given, scale,
    FORCED: tl.constexpr, ESTIMATES: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PART: tl.constexpr,
    LEAST: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend the first ``counts`` [R] of ``pages`` [R, M], a chunk at a time: part_out
    [R, chunks_given, G, D], part_lse [R, chunks_given, G] and, where the rule needs them, the
    moments [R, chunks_given, 3, G] of exact minus estimated masses. Grid (R, programs)."""
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    length = tl.load(seq_lens + b)
    rule = tl.load(mode + b)
    count = tl.load(counts + r)
    compare = rule == CONSERVATIVE
    if not FORCED:
        compare = compare | (rule == COVERAGE)
    g = tl.arange(0, GT)
    dims = tl.arange(0, DT)
    real = (g < G)[:, None] & (dims < D)[None, :]
    at = q + b * q_row + (h * G + g)[:, None] * q_head + dims[None, :]
    query = tl.load(at, mask=real, other=0.0).to(DOT)
    token = tl.arange(0, PAGES * PART)
    size = chunk_pages(count, LEAST, PAGES, CHUNKS)
    chunk = tl.program_id(1)
    while chunk * size < count:
        stop = tl.minimum(chunk * size + size, count)
        top = tl.full([GT], float("-inf"), tl.float32)
        total = tl.zeros([GT], tl.float32)
        acc = tl.zeros([GT, DT], tl.float32)
        number = tl.zeros([GT], tl.float32)
        mean = tl.zeros([GT], tl.float32)
        square = tl.zeros([GT], tl.float32)
        for first in range(chunk * size, stop, PAGES):
            mass = tl.full([GT, PAGES], float("-inf"), tl.float32)
            place = first + token // PART
            page = tl.load(pages + r * M + place, mask=place < stop, other=0)
            frame = tl.load(page_table + b * table_row + page, mask=place < stop, other=0)
            for part in range(PAGE // PART):
                offset = part * PART + token % PART
                live = (place < stop) & (page * PAGE + offset < length)
                slot = frame.to(tl.int64) * PAGE + offset
                logits = tile_logits(
                    query, k + h * k_head, slot, live, dims, D, k_slot, scale, PRECISION
                )
                top, total, acc = absorb(
                    logits, v + h * v_head, slot, live, dims, D, v_slot, top, total, acc,
                    DOT, PRECISION,
                )  # fmt: skip
                if ESTIMATES:
                    if compare:
                        mass = log_add(mass, page_masses(logits, PAGES, PART))
            if ESTIMATES:
                if compare:
                    spot = first + tl.arange(0, PAGES)
                    own = tl.load(pages + r * M + spot, mask=spot < stop, other=0)
                    estimate = tl.load(
                        log_mass + (r * G + g)[:, None] * M + own[None, :],
                        mask=(g < G)[:, None] & (spot < stop)[None, :],
                        other=0.0,
                    )
                    # A page without an estimate in any head counts in none; -inf not in its own.
                    usable = tl.max(tl.where(estimate < float("inf"), 0, 1), 0) == 0
                    known = (usable & (spot < stop))[None, :] & (estimate > float("-inf"))
                    number, mean, square = add_moments(number, mean, square, mass - estimate, known)
        state = (r * chunks_given + chunk) * G + g
        tl.store(part_lse + state, finite(top) + tl.log(total), mask=g < G)
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(part_out + state[:, None] * D + dims[None, :], out, mask=real)
        if ESTIMATES:
            if compare:
                state = (r * chunks_given + chunk) * 3 * G + g
                tl.store(part_moments + state, number, mask=g < G)
                tl.store(part_moments + state + G, mean, mask=g < G)
                tl.store(part_moments + state + 2 * G, square, mask=g < G)
        chunk += tl.num_programs(1)


@triton.jit
def merge_chunks(
    mode, counts, part_out, part_lse, part_moments, out, lse, moments, chunks_given,
    FORCED: tl.constexpr, ESTIMATES: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGES: tl.constexpr, LEAST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Union of the chunks (and, unless FORCED, of what ``out`` and ``lse`` hold already):
    out float32 [R, G, D], lse [R, G], moments [R, 3, G] of the pages that the rule compares.
    Grid (R, G)."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    rule = tl.load(mode + r // HKV)
    count = tl.load(counts + r)
    used = tl.cdiv(count, chunk_pages(count, LEAST, PAGES, CHUNKS))
    dims = tl.arange(0, DT)
    chunk = tl.arange(0, CHUNKS)
    part = tl.load(
        part_lse + (r * chunks_given + chunk) * G + g, mask=chunk < used, other=float("-inf")
    )
    whole = tl.max(part, 0)
    before = float("-inf")
    acc = tl.zeros([DT], tl.float32)
    at = r * G + g
    if not FORCED:
        before = tl.load(lse + at)
        acc = tl.load(out + at * D + dims, mask=dims < D, other=0.0)
        whole = tl.maximum(whole, before)
    base = finite(whole)
    total = tl.sum(tl.exp(part - base), 0) + tl.exp(before - base)
    whole = base + tl.log(total)
    base = finite(whole)
    acc = acc * tl.exp(before - base)
    for first in range(0, used, BLOCK):
        block = first + tl.arange(0, BLOCK)
        state = (r * chunks_given + block) * G + g
        weight = tl.exp(tl.load(part_lse + state, mask=block < used, other=float("-inf")) - base)
        values = tl.load(
            part_out + state[:, None] * D + dims[None, :],
            mask=(block < used)[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(weight[:, None] * values, 0)
    tl.store(out + at * D + dims, acc, mask=dims < D)
    tl.store(lse + at, whole)
    if ESTIMATES:
        compare = rule == CONSERVATIVE
        if not FORCED:
            compare = compare | (rule == COVERAGE)
        mine = compare & (chunk < used)
        state = (r * chunks_given + chunk) * 3 * G + g
        number = tl.load(part_moments + state, mask=mine, other=0.0)
        mean = tl.load(part_moments + state + G, mask=mine, other=0.0)
        square = tl.load(part_moments + state + 2 * G, mask=mine, other=0.0)
        both = tl.sum(number, 0)
        middle = tl.sum(number * mean, 0) / tl.maximum(both, 1.0)
        distance = mean - middle
        spread = tl.sum(square + number * distance * distance, 0)
        at = moments + r * 3 * G + g
        if not FORCED:
            if rule == CONSERVATIVE:
                old, old_mean = tl.load(at), tl.load(at + G)
                union = tl.maximum(both + old, 1.0)
                away = middle - old_mean
                spread += tl.load(at + 2 * G) + away * away * both * old / union
                middle = (middle * both + old_mean * old) / union
                both += old
        tl.store(at, both)
        tl.store(at + G, middle)
        tl.store(at + 2 * G, spread)


@triton.jit
def rounds(
    q, k, v, page_table, seq_lens, log_mass, mode, threshold, kappa_floor, kappa_std,
    order, key, suffix, total_mass, moments, scored, group_count, group_end,
    state_out, state_lse, attended, out, kappa_out, rounds_out,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row, M, group_pages, scale,
    GROUPED: tl.constexpr, ESTIMATES: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PART: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All groups that are left, until the rule stops; then the result. Grid (R,).

    A round looks at windows of PAGES places in ``order`` and attends the wanted pages among them
    until it has ``group_pages``; the bar of the marginal rule is the one of the round's start. A
    page that is passed over is never wanted again, because what is attended only grows.
    ``GROUPED``: the first group has been attended; its end and size are given.
    """
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    g = tl.arange(0, GT)
    real = g < G
    dims = tl.arange(0, DT)
    tile = real[:, None] & (dims < D)[None, :]
    top = tl.load(state_lse + r * G + g, mask=real, other=0.0)
    acc = tl.load(state_out + (r * G + g)[:, None] * D + dims[None, :], mask=tile, other=0.0)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    number = tl.zeros([GT], tl.float32)
    mean = tl.zeros([GT], tl.float32)
    square = tl.zeros([GT], tl.float32)
    kappa = tl.zeros([GT], tl.float32)
    passed = 0
    if ESTIMATES:
        rule = tl.load(mode + b)
        limit = tl.load(threshold + b)
        floor = tl.load(kappa_floor + b)
        deviations = tl.load(kappa_std + b)
        left = tl.load(scored + r)
        length = tl.load(seq_lens + b)
        token = tl.arange(0, PAGES * PART)
        rows = q + b * q_row + (h * G + g)[:, None] * q_head + dims[None, :]
        query = tl.load(rows, mask=tile, other=0.0).to(DOT)
        whole = tl.load(total_mass + r * G + g, mask=real, other=0.0)
        cursor = left * 0
        passed = left * 0
        going = left > 0
        if GROUPED:
            cursor = tl.load(group_end + r)
            passed = (tl.load(group_count + r) > 0).to(tl.int32)
            going = (cursor < left) & (passed > 0)
        compare = (rule == CONSERVATIVE) | (rule == COVERAGE)
        if (rule == CONSERVATIVE) | ((rule == COVERAGE) & (passed > 0)):
            known_so_far = moments + r * 3 * G + g
            number = tl.load(known_so_far, mask=real, other=0.0)
            mean = tl.load(known_so_far + G, mask=real, other=0.0)
            square = tl.load(known_so_far + 2 * G, mask=real, other=0.0)
            kappa = correction(number, mean, square, deviations, floor)
        lse = top
        gap = tl.max(tl.where(real, whole - lse, 0.0), 0)
        if going & compare:
            going = uncovered(suffix, r, g, G, M, cursor, kappa, lse + limit) > 0
        if going & (rule == MARGINAL):
            going = worth_looking(key + r * M, cursor, left, gap, limit)
        taken = left * 0
        while going:
            at = cursor + tl.arange(0, PAGES)
            inside = at < left
            page = tl.load(order + r * M + at, mask=inside, other=0)
            estimate = tl.load(
                log_mass + (r * G + g)[:, None] * M + page[None, :],
                mask=real[:, None] & inside[None, :],
                other=float("-inf"),
            )
            wanted = inside
            if rule == MARGINAL:
                wanted = tl.max((estimate > (lse + limit)[:, None]).to(tl.int32), 0) > 0
            rank = taken + tl.cumsum(wanted.to(tl.int32), 0)
            take = wanted & (rank <= group_pages)
            more = tl.sum(take.to(tl.int32), 0)
            if more > 0:
                tl.store(attended + r * M + page, tl.full([PAGES], 1, tl.uint8), mask=take)
                place = cursor + token // PART
                by_token = tl.broadcast_to(take.to(tl.int32)[:, None], [PAGES, PART])
                chosen = tl.reshape(by_token, [PAGES * PART]) > 0
                own = tl.load(order + r * M + place, mask=chosen, other=0)
                frame = tl.load(page_table + b * table_row + own, mask=chosen, other=0)
                mass = tl.full([GT, PAGES], float("-inf"), tl.float32)
                for part in range(PAGE // PART):
                    offset = part * PART + token % PART
                    live = chosen & (own * PAGE + offset < length)
                    slot = frame.to(tl.int64) * PAGE + offset
                    logits = tile_logits(
                        query, k + h * k_head, slot, live, dims, D, k_slot, scale, PRECISION
                    )
                    top, total, acc = absorb(
                        logits, v + h * v_head, slot, live, dims, D, v_slot, top, total, acc,
                        DOT, PRECISION,
                    )  # fmt: skip
                    if compare:
                        mass = log_add(mass, page_masses(logits, PAGES, PART))
                if compare:
                    if (rule == COVERAGE) & (taken == 0):
                        number, mean, square = number * 0.0, mean * 0.0, square * 0.0
                    known = take[None, :] & (estimate > float("-inf"))
                    number, mean, square = add_moments(number, mean, square, mass - estimate, known)
                taken += more
            full = taken >= group_pages
            last = tl.max(tl.where(take, at, -1), 0)
            cursor = tl.where(full, last + 1, tl.minimum(cursor + PAGES, left))
            ended = cursor >= left
            if rule == MARGINAL:
                ended = ended | (worth_looking(key + r * M, cursor, left, gap, limit) == 0)
            going = ended == 0
            if full | (ended & (taken > 0)):
                passed += 1
                taken = taken * 0
                lse = finite(top) + tl.log(total)
                gap = tl.max(tl.where(real, whole - lse, 0.0), 0)
                if compare:
                    kappa = correction(number, mean, square, deviations, floor)
                    if going:
                        going = uncovered(suffix, r, g, G, M, cursor, kappa, lse + limit) > 0
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(state_lse + r * G + g, finite(top) + tl.log(total), mask=real)
    tl.store(out + (r * G + g)[:, None] * D + dims[None, :], acc, mask=tile)
    tl.store(kappa_out + r * G + g, kappa, mask=real)
    tl.store(rounds_out + r, passed)
