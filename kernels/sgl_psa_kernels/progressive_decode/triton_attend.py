"""Triton kernels of progressive decode that read keys and values.

Lists of pages are attended in chunks whose length follows from the list alone, and the partial
results are merged in a fixed order: a row's result depends neither on the batch nor on the device.

``TIERED``: pages lie in records [2, Hkv, PAGE, D] anywhere in memory that the device can address;
``place_of`` int64 has where each begins, in units of 16 elements from the pointers ``k`` and ``v``.
``INT8``: those that do not begin within the ``arena`` first units are records of
``page_tier/codec.py``; ``codes`` is ``k`` by bytes, and INT8 the bytes of a unit.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_select import CONSERVATIVE, COVERAGE
from sgl_psa_kernels.triton_int8 import decode_keys, decode_values
from sgl_psa_kernels.triton_support import PLACE_UNIT
from sgl_psa_kernels.triton_tiles import (
    absorb,
    add_moments,
    finite,
    load_moments,
    log_add,
    page_masses,
    store_moments,
    tile_logits,
    tile_rows,
)

UNIT = tl.constexpr(PLACE_UNIT)


@triton.jit
def compared(rule, FORCED: tl.constexpr, TOLD: tl.constexpr):
    """Whether the pages of a list are held against their estimates."""
    compare = rule == CONSERVATIVE
    if TOLD or not FORCED:
        compare = compare | (rule == COVERAGE)
    return compare


@triton.jit
def first_slot(page, place, live, PAGE: tl.constexpr, TIERED: tl.constexpr):
    """Slots of the first tokens of physical pages; where TIERED: of ``UNIT`` elements."""
    slot = page.to(tl.int64) * PAGE
    if TIERED:
        slot = tl.load(place + page, mask=live, other=0)
    return slot


@triton.jit
def listed_tokens(
    listed, table, place_of, first, stop, token,
    PAGE: tl.constexpr, PART: tl.constexpr, TIERED: tl.constexpr,
):  # fmt: skip
    """(inside, page, begin) of the tokens of a tile of a list from place ``first`` on: whether the
    place is before ``stop``, the logical page, and its :func:`first_slot`."""
    place = first + token // PART
    inside = place < stop
    page = tl.load(listed + place, mask=inside, other=0)
    frame = tl.load(table + page, mask=inside, other=0)
    return inside, page, first_slot(frame, place_of, inside, PAGE, TIERED)


@triton.jit
def page_rows(
    x, codes, begin, offset, live, arena, h, head, stride, dims, VALUES: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, PART: tl.constexpr, TIERED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Keys or values [PAGES * PART, DIMS] of a KV head.

    Args:
        x: pointer to keys or values, ``head`` elements from head to head, ``stride`` from slot to
            slot.
        begin: :func:`first_slot` of each token's page; offset: the token's place in it.
    """
    apart: tl.constexpr = D // UNIT if TIERED else 1
    near = live
    if INT8:
        near = live & (begin >= 0) & (begin < arena)
    rows = tile_rows(x + h * head, begin + offset * apart, near, dims, D, stride)
    if INT8:
        away = live & (near == 0)
        if VALUES:
            coded = decode_values(codes, begin * INT8, offset, away, h, dims, HKV, D, PAGE)
        else:
            coded = decode_keys(
                codes, begin * INT8, offset, away, h, dims, HKV, D, PAGE, PAGES, PART
            )
        rows = tl.where(away[:, None], coded.to(rows.dtype), rows)
    return rows


@triton.jit
def attend_tile(
    query, k, v, codes, begin, offset, live, arena, h, k_head, k_slot, v_head, v_slot, dims, scale,
    top, total, acc,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
    PART: tl.constexpr, TIERED: tl.constexpr, INT8: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens of :func:`page_rows`, and the softmax state that has taken them up."""
    keys = page_rows(
        k, codes, begin, offset, live, arena, h, k_head, k_slot, dims, False,
        HKV, D, PAGE, PAGES, PART, TIERED, INT8,
    )  # fmt: skip
    logits = tile_logits(query, keys, live, scale, PRECISION)
    values = page_rows(
        v, codes, begin, offset, live, arena, h, v_head, v_slot, dims, True,
        HKV, D, PAGE, PAGES, PART, TIERED, INT8,
    )  # fmt: skip
    top, total, acc = absorb(logits, values, top, total, acc, DOT, PRECISION)
    return logits, top, total, acc


@triton.jit
def chunk_pages(count, LEAST: tl.constexpr, PAGES: tl.constexpr, CHUNKS: tl.constexpr):
    """Pages of a chunk of a list of ``count``: whole tiles, at most CHUNKS chunks."""
    pages = tl.maximum((count + CHUNKS - 1) // CHUNKS, LEAST)
    return (pages + PAGES - 1) // PAGES * PAGES


@triton.jit
def attend_list(
    q, k, v, page_table, seq_lens, place_of, codes, arena, mode, log_mass, pages, counts,
    part_out, part_lse, part_moments,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row, M, chunks_given, scale,
    FORCED: tl.constexpr, ESTIMATES: tl.constexpr, TOLD: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PART: tl.constexpr,
    LEAST: tl.constexpr, CHUNKS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TIERED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Attend the first ``counts`` [R] of ``pages`` [R, M], a chunk at a time: part_out
    [R, chunks_given, G, D], part_lse [R, chunks_given, G] and, where the rule needs them, the
    moments [R, chunks_given, 3, G] of exact minus estimated masses. Grid (R, programs)."""
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    length = tl.load(seq_lens + b)
    rule = tl.load(mode + b)
    count = tl.load(counts + r)
    compare = compared(rule, FORCED, TOLD)
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
            inside, page, begin = listed_tokens(
                pages + r * M, page_table + b * table_row, place_of, first, stop, token,
                PAGE, PART, TIERED,
            )  # fmt: skip
            for part in range(PAGE // PART):
                offset = part * PART + token % PART
                live = inside & (page * PAGE + offset < length)
                logits, top, total, acc = attend_tile(
                    query, k, v, codes, begin, offset, live, arena, h, k_head, k_slot,
                    v_head, v_slot, dims, scale, top, total, acc,
                    HKV, D, PAGE, PAGES, PART, TIERED, INT8, DOT, PRECISION,
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
                store_moments(part_moments + state, number, mean, square, g < G, G)
        chunk += tl.num_programs(1)


@triton.jit
def union(count, mean, square, more, middle, spread):
    """Moments of two sets together."""
    both = tl.maximum(count + more, 1.0)
    away = middle - mean
    square += spread + away * away * count * more / both
    return count + more, (mean * count + middle * more) / both, square


@triton.jit
def merge_chunks(
    mode, counts, part_out, part_lse, part_moments, out, lse, latest, seen, chunks_given,
    FORCED: tl.constexpr, ESTIMATES: tl.constexpr, TOLD: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGES: tl.constexpr, LEAST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Union of the chunks (and, unless FORCED, of what ``out`` and ``lse`` hold already):
    out float32 [R, G, D], lse [R, G]; and the moments [R, 3, G] of the pages that the rule
    compares: ``latest`` of this list, ``seen`` of all. An empty group changes nothing.
    Grid (R, G)."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    rule = tl.load(mode + r // HKV)
    count = tl.load(counts + r)
    if FORCED or count > 0:
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
            share = tl.load(part_lse + state, mask=block < used, other=float("-inf"))
            values = tl.load(
                part_out + state[:, None] * D + dims[None, :],
                mask=(block < used)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            acc += tl.sum(tl.exp(share - base)[:, None] * values, 0)
        tl.store(out + at * D + dims, acc, mask=dims < D)
        tl.store(lse + at, whole)
        if ESTIMATES:
            mine = compared(rule, FORCED, TOLD) & (chunk < used)
            state = (r * chunks_given + chunk) * 3 * G + g
            number, mean, square = load_moments(part_moments + state, mine, G)
            both = tl.sum(number, 0)
            middle = tl.sum(number * mean, 0) / tl.maximum(both, 1.0)
            distance = mean - middle
            spread = tl.sum(square + number * distance * distance, 0)
            at = r * 3 * G + g
            store_moments(latest + at, both, middle, spread, True, G)
            if not FORCED:
                old, old_mean, old_square = load_moments(seen + at, True, G)
                both, middle, spread = union(old, old_mean, old_square, both, middle, spread)
            store_moments(seen + at, both, middle, spread, True, G)
