"""Triton kernel that estimates page masses from sketches."""

import triton
import triton.language as tl

from sgl_psa_kernels.key_sketch.triton_layout import byte_place
from sgl_psa_kernels.triton_tiles import log_add, page_masses


@triton.jit
def score(
    q, codes, affine, watermark, page_table, seq_lens, active, candidates, log_mass,
    q_row, q_head, table_row, M, scale,
    BITS: tl.constexpr, ROTATED: tl.constexpr, CHOSEN: tl.constexpr, SPLIT: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_T: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Estimates of a tile of pages; no candidates keep theirs. Grid (B * Hkv, tiles).

    The codes of one plane are a matrix of small integers, exact in the product's type DOT; a
    product a plane. ``SPLIT``: float32 queries, as two numbers of DOT each.
    """
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    length = tl.load(seq_lens + b)
    first = tl.program_id(1) * PAGES
    if (first * PAGE < length) & (tl.load(active + b) != 0):
        g = tl.arange(0, GT)
        byte = tl.arange(0, WIDTH_T)
        token = tl.arange(0, PAGES * PART)
        page = first + tl.arange(0, PAGES)
        inside = page * PAGE < length
        frame = tl.load(page_table + b * table_row + page, mask=inside, other=0).to(tl.int64)
        needed = tl.minimum(length - page * PAGE, PAGE)
        stale = tl.load(watermark + frame, mask=inside, other=0) < needed
        wanted = inside & (stale == 0)
        skipped = page < 0
        if CHOSEN:
            skipped = tl.load(candidates + r * M + page, mask=inside, other=1) == 0
            wanted = wanted & (skipped == 0)
        rows = q + b * q_row + (h * G + g)[:, None] * q_head
        peak = tl.full([GT], 1.0, tl.float32)
        if SPLIT:
            dims = tl.arange(0, DT)
            every = (g < G)[:, None] & (dims < D)[None, :]
            whole = tl.load(rows + dims[None, :], mask=every, other=0.0).to(tl.float32)
            peak = tl.max(tl.abs(whole), 1)
            peak = tl.where(peak > 0, peak, 1.0)
        mass = tl.full([GT, PAGES], float("-inf"), tl.float32)
        spread = tl.broadcast_to(wanted.to(tl.int32)[:, None], [PAGES, PART])
        reading = tl.reshape(spread, [PAGES * PART]) > 0
        if tl.sum(wanted.to(tl.int32), 0) > 0:
            own = first + token // PART
            home = tl.load(page_table + b * table_row + own, mask=reading, other=0).to(tl.int64)
            home = (home * HKV + h) * PAGE
            for part in range(PAGE // PART):
                offset = part * PART + token % PART
                live = reading & (own * PAGE + offset < length)
                at = codes + (home * WIDTH)[:, None]
                at += byte_place(offset[:, None], byte[None, :], PAGE, WIDTH)
                packed = tl.load(at, mask=live[:, None] & (byte < WIDTH)[None, :], other=0)
                dots = tl.zeros([GT, PAGES * PART], tl.float32)
                sums = tl.zeros([GT], tl.float32)
                for plane in tl.static_range(8 // BITS):
                    code = (packed.to(tl.int32) >> (BITS * plane)) & ((1 << BITS) - 1)
                    keys = tl.trans(code.to(tl.float32).to(DOT))
                    x = tl.load(
                        rows + (plane * WIDTH + byte)[None, :],
                        mask=(g < G)[:, None] & (byte < WIDTH)[None, :],
                        other=0.0,
                    )
                    sums += tl.sum(x.to(tl.float32), 1)
                    if SPLIT:
                        unit = x / peak[:, None]
                        high = unit.to(DOT)
                        low = ((unit - high.to(tl.float32)) * 2048.0).to(DOT)
                        here = tl.dot(high, keys) + tl.dot(low, keys) * (1.0 / 2048.0)
                        dots += here * peak[:, None]
                    else:
                        dots = tl.dot(x.to(DOT), keys, dots)
                if ROTATED:
                    step = tl.load(affine + home + offset, mask=live, other=0.0).to(tl.float32)
                    zero = step * (-((1 << BITS) - 1) / 2)
                else:
                    pair = affine + (home + offset) * 2
                    step = tl.load(pair, mask=live, other=0.0).to(tl.float32)
                    zero = tl.load(pair + 1, mask=live, other=0.0).to(tl.float32)
                logits = (dots * step[None, :] + sums[:, None] * zero[None, :]) * scale
                logits = tl.where(live[None, :], logits, float("-inf"))
                mass = log_add(mass, page_masses(logits, PAGES, PART))
        # NaN is not below infinity either.
        mass = tl.where(mass < float("inf"), mass, float("inf"))
        mass = tl.where(stale[None, :], float("inf"), mass)
        to = log_mass + (r * G + g)[:, None] * M + page[None, :]
        tl.store(to, mass, mask=(g < G)[:, None] & (inside & (skipped == 0))[None, :])
