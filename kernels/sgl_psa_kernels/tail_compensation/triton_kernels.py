"""Triton kernels of tail compensation.

The pages left out are like keys whose logits are the estimated masses: they are taken in by chunks,
whose results are merged with the output in a fixed order.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_tiles import absorb, finite, tile_rows


@triton.jit
def row_pages(seq_lens, active, b, PAGE: tl.constexpr):
    """Pages of a row, 0 of one that is not active."""
    n = (tl.load(seq_lens + b) + PAGE - 1) // PAGE
    return tl.where(tl.load(active + b) != 0, n, 0)


@triton.jit
def partial(
    log_mass, attended, means, page_table, seq_lens, active, part_out, part_lse, part_left,
    mean_page, mean_head, table_row, M, chunks,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each chunk of CHUNK pages: part_out float32 [R, chunks, G, D] and part_lse [R, chunks, G]
    of the pages left out, and their number part_left [R, chunks]. Grid (R, chunks)."""
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    chunk = tl.program_id(1)
    n = row_pages(seq_lens, active, b, PAGE)
    if chunk * CHUNK < n:
        g = tl.arange(0, GT)
        dims = tl.arange(0, DT)
        top = tl.full([GT], float("-inf"), tl.float32)
        total = tl.zeros([GT], tl.float32)
        acc = tl.zeros([GT, DT], tl.float32)
        count = n * 0
        for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), PAGES):
            page = first + tl.arange(0, PAGES)
            left = page < n
            left = left & (tl.load(attended + r * M + page, mask=left, other=1) == 0)
            count += tl.sum(left.to(tl.int32), 0)
            frame = tl.load(page_table + b * table_row + page, mask=left, other=0).to(tl.int64)
            mass = tl.load(
                log_mass + (r * G + g)[:, None] * M + page[None, :],
                mask=(g < G)[:, None] & left[None, :],
                other=float("-inf"),
            )
            rows = tile_rows(means + h * mean_head, frame, left, dims, D, mean_page)
            top, total, acc = absorb(mass, rows, top, total, acc, tl.float32, "tf32x3")
        state = (r * chunks + chunk) * G + g
        tl.store(part_lse + state, finite(top) + tl.log(total), mask=g < G)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        real = (g < G)[:, None] & (dims < D)[None, :]
        tl.store(part_out + state[:, None] * D + dims[None, :], acc, mask=real)
        tl.store(part_left + r * chunks + chunk, count)


@triton.jit
def finish(
    out, lse, seq_lens, active, part_out, part_lse, part_left, result, out_row, out_head, chunks,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result [B, Hq, D]: the output and the chunks together. Grid (R, G)."""
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    g = tl.program_id(1)
    head = h * G + g
    dims = tl.arange(0, DT)
    used = tl.cdiv(row_pages(seq_lens, active, b, PAGE), CHUNK)
    plain = tl.load(out + b * out_row + head * out_head + dims, mask=dims < D, other=0.0)
    mass = tl.load(lse + r * G + g)
    top = mass
    left = used * 0
    for first in range(0, used, BLOCK):
        at = r * chunks + first + tl.arange(0, BLOCK)
        here = first + tl.arange(0, BLOCK) < used
        part = tl.load(part_lse + at * G + g, mask=here, other=float("-inf"))
        top = tl.maximum(top, tl.max(part, 0))
        left += tl.sum(tl.load(part_left + at, mask=here, other=0), 0)
    base = finite(top)
    share = tl.exp(mass - base)
    total = share
    acc = tl.where(share > 0, plain.to(tl.float32) * share, 0.0)
    for first in range(0, used, BLOCK):
        at = r * chunks + first + tl.arange(0, BLOCK)
        here = first + tl.arange(0, BLOCK) < used
        weight = tl.exp(tl.load(part_lse + at * G + g, mask=here, other=float("-inf")) - base)
        values = tl.load(
            part_out + (at * G + g)[:, None] * D + dims[None, :],
            mask=here[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        total += tl.sum(weight, 0)
        acc += tl.sum(weight[:, None] * values, 0)
    whole = (acc / tl.where(total > 0, total, 1.0)).to(plain.dtype)
    tl.store(result + (r * G + g) * D + dims, tl.where(left > 0, whole, plain), mask=dims < D)
