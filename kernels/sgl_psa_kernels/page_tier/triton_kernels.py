"""Triton kernels that write, move and read records of pages, and see which ones are attended.

A place is where a record [2, HKV, PAGE, D] begins, in units of ``UNIT`` elements from ``arena``:
frame f lies at f * FRAME (units), page p of layer l on the host at origin + (l * P + p) * RECORD.
``origin`` may be negative: pinned host memory lies anywhere in the address space of the device.
Tables are rows of one layer where ``layer`` is not among the arguments. With ``INT8``, the bytes of
a unit, records on the host are those of ``codec.py``; ``codes`` is then ``arena`` by bytes.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.page_tier import triton_state
from sgl_psa_kernels.triton_int8 import decode_keys, decode_values
from sgl_psa_kernels.triton_support import PLACE_UNIT

UNIT = tl.constexpr(PLACE_UNIT)
HITS = tl.constexpr(triton_state.HITS)
THROUGH = tl.constexpr(triton_state.THROUGH)
SHORT = tl.constexpr(triton_state.SHORT)
MISSED = tl.constexpr(triton_state.MISSED)
LIST = tl.constexpr(triton_state.LIST)


@triton.jit(do_not_specialize=["layer"])
def store(
    k, v, slots, arena, place, origin, filled, layer, P, k_row, k_head, v_row, v_head,
    HKV: tl.constexpr, HT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Rows of a token into the record on the host, and into the page's frame. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    page = slot // PAGE
    offset = slot % PAGE
    key = layer.to(tl.int64) * P + page
    h = tl.arange(0, HT)[:, None]
    dims = tl.arange(0, DT)[None, :]
    real = (h < HKV) & (dims < D)
    keys = tl.load(k + row * k_row + h * k_head + dims, mask=real)
    values = tl.load(v + row * v_row + h * v_head + dims, mask=real)
    inner = (h * PAGE + offset) * D + dims
    host = tl.load(origin) + key * RECORD
    tl.store(arena + host * UNIT + inner, keys, mask=real)
    tl.store(arena + (host * UNIT + HKV * PAGE * D) + inner, values, mask=real)
    frame = tl.load(place + page)
    if frame != host:
        tl.store(arena + frame * UNIT + inner, keys, mask=real)
        tl.store(arena + (frame * UNIT + HKV * PAGE * D) + inner, values, mask=real)
    tl.atomic_max(filled + key, (offset + 1).to(tl.int32))


@triton.jit(do_not_specialize=["layer", "tokens"])
def gather(
    arena, codes, place, pages, k_out, v_out, filled, numbers, layer, P, tokens, end,
    HKV: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """The first tokens of consecutive pages, [tokens, HKV, D]. Grid (pages, HKV, PAGE / PART)."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    page = tl.load(pages + i)
    key = layer.to(tl.int64) * P + page
    if tl.load(filled + key) < tl.minimum(tokens - i * PAGE, PAGE):
        tl.atomic_max(numbers + SHORT, key + 1)
    where = tl.load(place + page)
    offset = tl.program_id(2) * PART + tl.arange(0, PART)
    dims = tl.arange(0, DT)
    token = i * PAGE + offset
    real = (token < tokens)[:, None] & (dims < D)[None, :]
    near = real
    if INT8:
        near = real & (where >= 0) & (where < end)
    at = where * UNIT + (h * PAGE + offset)[:, None] * D + dims[None, :]
    keys = tl.load(arena + at, mask=near)
    values = tl.load(arena + HKV * PAGE * D + at, mask=near)
    if INT8:
        if (where < 0) | (where >= end):
            begin = tl.zeros([PART], tl.int64) + where * INT8
            live = token < tokens
            keys = decode_keys(
                codes, begin, offset, live, h, dims, HKV, D, PAGE, 1, PART
            ).to(keys.dtype)  # fmt: skip
            values = decode_values(
                codes, begin, offset, live, h, dims, HKV, D, PAGE
            ).to(values.dtype)  # fmt: skip
    to = (token[:, None] * HKV + h) * D + dims[None, :]
    tl.store(k_out + to, keys, mask=real)
    tl.store(v_out + to, values, mask=real)


@triton.jit(do_not_specialize=["n"])
def bring(
    arena, origin, keys, frames, n,
    FRAME: tl.constexpr, RECORD: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Records of ``keys`` int64 [n], layer * P + page, from the host to ``frames`` int64 [n], in
    CHUNKS parts each. Few programs take turns: attention on another stream keeps the other
    multiprocessors. Grid (programs,)."""
    first = tl.load(origin)
    for turn in range(tl.program_id(0), n * CHUNKS, tl.num_programs(0)):
        i = turn // CHUNKS
        element = turn % CHUNKS * BLOCK + tl.arange(0, BLOCK)
        host = first + tl.load(keys + i) * RECORD
        frame = tl.load(frames + i) * FRAME
        real = element < FRAME * UNIT
        part = tl.load(arena + host * UNIT + element, mask=real)
        tl.store(arena + frame * UNIT + element, part, mask=real)


@triton.jit(do_not_specialize=["n"])
def bring_int8(
    arena, codes, origin, keys, frames, n,
    HKV: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr,
    FRAME: tl.constexpr, RECORD: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """As :func:`bring`, decoded; a turn is PART tokens of a KV head."""
    first = tl.load(origin)
    dims = tl.arange(0, DT)
    parts: tl.constexpr = PAGE // PART
    live = tl.full([PART], 1, tl.int1)
    for turn in range(tl.program_id(0), n * HKV * parts, tl.num_programs(0)):
        i = turn // (HKV * parts)
        h = turn // parts % HKV
        offset = turn % parts * PART + tl.arange(0, PART)
        begin = tl.zeros([PART], tl.int64) + (first + tl.load(keys + i) * RECORD) * INT8
        rows = decode_keys(codes, begin, offset, live, h, dims, HKV, D, PAGE, 1, PART)
        at = tl.load(frames + i) * FRAME * UNIT + (h * PAGE + offset)[:, None] * D + dims[None, :]
        real = (dims < D)[None, :]
        tl.store(arena + at, rows.to(arena.dtype.element_ty), mask=real)
        rows = decode_values(codes, begin, offset, live, h, dims, HKV, D, PAGE)
        tl.store(arena + HKV * PAGE * D + at, rows.to(arena.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["layer", "step"])
def fold(
    attended, page_table, seq_lens, place, filled, stamp, uses, numbers,
    layer, step, P, F, table_row, M, capacity,
    HKV: tl.constexpr, PAGE: tl.constexpr, FRAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a decode of a layer attended: step of its pages, uses of their frames, numbers, and a
    list of the pages that have no frame, once a step. Grid (B, blocks of pages)."""
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + b)
    n = (length + PAGE - 1) // PAGE
    first = tl.program_id(1) * BLOCK
    if first < n:
        at = first + tl.arange(0, BLOCK)
        heads = tl.zeros([BLOCK], tl.int32)
        for h in range(HKV):
            flag = tl.load(attended + (b * HKV + h) * M + at, mask=at < n, other=0)
            heads += (flag != 0).to(tl.int32)
        touched = heads > 0
        page = tl.load(page_table + b * table_row + at, mask=touched, other=0).to(tl.int64)
        key = layer.to(tl.int64) * P + page
        where = tl.load(place + page, mask=touched, other=-1)
        frame = where // FRAME
        inside = (where >= 0) & (frame < F)
        tl.atomic_add(uses + frame, heads, mask=inside)
        before = tl.atomic_xchg(stamp + key, tl.zeros_like(heads) + step, mask=touched)
        through = touched & (inside == 0)
        holds = tl.load(filled + key, mask=touched, other=PAGE)
        short = touched & (holds < tl.minimum(length - at * PAGE, PAGE))
        # One of the rows that share a page lists it.
        new = through & (before != step)
        count = tl.sum(new.to(tl.int32), 0)
        if count > 0:
            begin = tl.atomic_add(numbers + MISSED, count.to(tl.int64))
            to = begin + tl.cumsum(new.to(tl.int32), 0) - 1
            entry = key * 2 + (holds < PAGE).to(tl.int64)
            tl.store(numbers + LIST + to, entry, mask=new & (to < capacity))
        tl.atomic_add(numbers + HITS, tl.sum(tl.where(inside, heads, 0), 0).to(tl.int64))
        tl.atomic_add(numbers + THROUGH, tl.sum(tl.where(through, heads, 0), 0).to(tl.int64))
        worst = tl.max(tl.where(short, key + 1, 0), 0)
        if worst > 0:
            tl.atomic_max(numbers + SHORT, worst)
