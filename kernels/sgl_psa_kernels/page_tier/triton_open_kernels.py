"""Triton kernels that write tokens under an int8 host: open pages, and what becomes of them.

A page that is not full is exact, in a frame set aside; full pages are records of ``codec.py`` on
the host. Frames set aside that no page has are a stack, ``spare`` int64 [1 + F]: their number, then
they. Frames are claimed and given back by different launches, and no launch reads what another
program of it moves. Places and records: see ``triton_kernels``, with frames of FRAME units.

``row_of`` int32 [slots] says in which row of a write a slot was, last time that it was in any.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.page_tier import triton_state
from sgl_psa_kernels.triton_int8 import encode
from sgl_psa_kernels.triton_support import PLACE_UNIT

UNIT = tl.constexpr(PLACE_UNIT)
LACKED = tl.constexpr(triton_state.LACKED)


@triton.jit(do_not_specialize=["n"])
def index(slots, row_of, n, BLOCK: tl.constexpr):
    """Remember the rows of ``slots`` int64 [n]; of one that is there twice, either. Grid
    (blocks,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < n, other=0)
    tl.store(row_of + slot, row, mask=row < n)


@triton.jit
def written_row(slots, row_of, slot, wanted, n):
    """Row of each slot in this write, -1 of one that is not ``wanted`` or not in it."""
    row = tl.load(row_of + slot, mask=wanted, other=0)
    known = wanted & (row >= 0) & (row < n)
    return tl.where(tl.load(slots + row, mask=known, other=-1) == slot, row, -1)


@triton.jit(do_not_specialize=["n"])
def claim(
    slots, row_of, place, spare, n, end,
    PAGE: tl.constexpr, FRAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A frame for every page that this write begins and does not fill, while there are any. Places
    of frames are below ``end``. Grid (blocks,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < n, other=0)
    page = slot // PAGE
    begins = (row < n) & (slot % PAGE == 0)
    # A slot may be there twice, as those of padding are.
    begins = begins & (tl.load(row_of + slot, mask=begins, other=-1) == row)
    begins = begins & (written_row(slots, row_of, slot + (PAGE - 1), begins, n) < 0)
    where = tl.load(place + page, mask=begins, other=0)
    needs = begins & ((where < 0) | (where >= end))
    count = tl.sum(needs.to(tl.int64), 0)
    if count > 0:
        there = tl.atomic_add(spare, -count)
        at = there - tl.cumsum(needs.to(tl.int64), 0)
        got = needs & (at >= 0)
        frame = tl.load(spare + 1 + at, mask=got, other=0)
        tl.store(place + page, frame * FRAME, mask=got)
        if there < count:
            # Never more than were there: what is lacking was not taken.
            tl.atomic_add(spare, tl.minimum(count, count - there))


@triton.jit
def page_tile(
    x, slots, row_of, exact, frame, slot, h, offset, dims, n, x_row, x_head,
    D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Tokens at ``offset`` of a page whose first slot is ``slot``, [TOKENS, DIMS]: rows of this
    write, or what the page's frame has of earlier ones. ``exact``: pointer to half a record."""
    row = written_row(slots, row_of, slot + offset, offset < PAGE, n)
    real = (offset < PAGE)[:, None] & (dims < D)[None, :]
    at = row.to(tl.int64)[:, None] * x_row + h * x_head + dims[None, :]
    new = tl.load(x + at, mask=real & (row >= 0)[:, None], other=0.0)
    at = (h * PAGE + offset)[:, None] * D + dims[None, :]
    old = tl.load(exact + at, mask=real & (row < 0)[:, None] & frame, other=0.0)
    return tl.where((row >= 0)[:, None], new, old), tl.min(row, 0) < 0


@triton.jit(do_not_specialize=["layer", "n"])
def store(
    k, v, slots, row_of, arena, codes, place, origin, filled, numbers, spare,
    layer, P, n, end, k_row, k_head, v_row, v_head,
    HKV: tl.constexpr, HT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr,
    FRAME: tl.constexpr, RECORD: tl.constexpr, BYTES: tl.constexpr,
    DIMS: tl.constexpr, TOKENS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Rows of a token into the frame of its open page; or, by the program of its last token, a page
    that is full now into its record, for which the frame is given back. Grid (n,).

    ``codes``: ``arena`` by bytes, BYTES of them a unit. Keys are encoded DIMS channels at a time,
    values TOKENS tokens.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    page = slot // PAGE
    offset = slot % PAGE
    first = slot - offset
    key = layer.to(tl.int64) * P + page
    last = first + (PAGE - 1)
    filler = written_row(slots, row_of, last, last >= 0, n)
    where = tl.load(place + page)
    in_frame = (where >= 0) & (where < end)
    half: tl.constexpr = HKV * PAGE * D
    if filler < 0:
        if in_frame:
            h = tl.arange(0, HT)[:, None]
            dims = tl.arange(0, DT)[None, :]
            real = (h < HKV) & (dims < D)
            at = row.to(tl.int64)
            keys = tl.load(k + at * k_row + h * k_head + dims, mask=real)
            values = tl.load(v + at * v_row + h * v_head + dims, mask=real)
            to = where * UNIT + (h * PAGE + offset) * D + dims
            tl.store(arena + to, keys, mask=real)
            tl.store(arena + half + to, values, mask=real)
            tl.atomic_max(filled + key, (offset + 1).to(tl.int32))
        else:
            tl.atomic_max(numbers + LACKED, key + 1)
    elif filler == row:
        home = tl.load(origin) + key * RECORD
        to = codes + home * BYTES
        exact = arena + where * UNIT
        tokens = tl.arange(0, PAGE)
        lacking = in_frame & (where < 0)  # False, and no constant: the loop carries it
        for h in range(HKV):
            for begin in range(0, D, DIMS):
                dims = begin + tl.arange(0, DIMS)
                tile, gap = page_tile(
                    k, slots, row_of, exact, in_frame, first, h, tokens, dims, n, k_row, k_head,
                    D, PAGE,
                )  # fmt: skip
                lacking = lacking | gap
                elements, exponents = encode(tile, 0, LOW, HIGH)
                real = dims < D
                at = (h * PAGE + tokens)[:, None] * D + dims[None, :]
                tl.store(to + at, elements, mask=real[None, :])
                tl.store(to + (2 * half + h * D) + dims, exponents, mask=real)
            dims = tl.arange(0, DT)
            for begin in range(0, PAGE, TOKENS):
                some = begin + tl.arange(0, TOKENS)
                tile, _ = page_tile(
                    v, slots, row_of, exact + half, in_frame, first, h, some, dims, n,
                    v_row, v_head, D, PAGE,
                )  # fmt: skip
                elements, exponents = encode(tile, 1, LOW, HIGH)
                at = (h * PAGE + some)[:, None] * D + dims[None, :]
                tl.store(to + half + at, elements, mask=(dims < D)[None, :])
                tl.store(to + (2 * half + HKV * D + h * PAGE) + some, exponents)
        if in_frame:
            tl.debug_barrier()  # All warps have read the old place.
            tl.store(place + page, home)
            there = tl.atomic_add(spare, 1)
            tl.store(spare + 1 + there, where // FRAME)
        elif lacking:
            tl.atomic_max(numbers + LACKED, key + 1)
        tl.atomic_max(filled + key, (offset + 1).to(tl.int32))


@triton.jit(do_not_specialize=["n"])
def give_back(
    pages, table, filled, spare, n, layers, P, row_length, end,
    PAGE: tl.constexpr, FRAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Frames of open pages among ``pages`` int64 [n], of all layers. Frames of full pages are the
    host's to give back. Grid (blocks,)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < n * layers
    layer = (i // n).to(tl.int64)
    page = tl.load(pages + i % n, mask=real, other=0)
    where = tl.load(table + layer * row_length + page, mask=real, other=-1)
    holds = tl.load(filled + layer * P + page, mask=real, other=PAGE)
    frees = (where >= 0) & (where < end) & (holds < PAGE)
    count = tl.sum(frees.to(tl.int64), 0)
    if count > 0:
        there = tl.atomic_add(spare, count)
        at = there + tl.cumsum(frees.to(tl.int64), 0)
        tl.store(spare + at, where // FRAME, mask=frees)
