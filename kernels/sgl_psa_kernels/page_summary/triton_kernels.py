"""Triton kernels of page summaries."""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_tiles import ceil_bfloat16, log_add, round_bfloat16


@triton.jit
def _put(summary, vector, x, dims, D: tl.constexpr):
    rounded = round_bfloat16(x).to(tl.bfloat16)
    tl.store(summary + vector * D + dims, rounded, mask=dims < D)


@triton.jit
def update(
    k, pages, fill, summary, k_slot, k_head,
    HKV: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr,
    VECTORS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Summaries of the pages given. Grid (pages, Hkv)."""
    page = tl.load(pages + tl.program_id(0))
    h = tl.program_id(1)
    tokens = tl.load(fill + tl.program_id(0))
    dims = tl.arange(0, DT)
    offset = tl.arange(0, PAGE)
    live = (offset < tokens)[:, None] & (dims < D)[None, :]
    at = k + (page * PAGE + offset)[:, None] * k_slot + h * k_head + dims[None, :]
    x = tl.load(at, mask=live, other=0.0).to(tl.float32)
    n = tokens.to(tl.float32)
    to = summary + (page * HKV + h) * VECTORS * D
    # Maxima pass NaN over: it is put back.
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    if (KIND == "hybrid") | (KIND == "mean") | (KIND == "gaussian"):
        mean = tl.sum(x, 0) / n
        _put(to, 0, mean, dims, D)
        if KIND != "mean":
            away = tl.where(live, x - mean[None, :], 0.0)
            _put(to, 1, tl.sum(away * away, 0) / n, dims, D)
    if (KIND == "hybrid") | (KIND == "cuboid_mean") | (KIND == "box"):
        low = tl.where(broken, float("nan"), tl.min(tl.where(live, x, float("inf")), 0))
        high = tl.where(broken, float("nan"), tl.max(tl.where(live, x, float("-inf")), 0))
        centre = (low + high) / 2
        _put(to, VECTORS - 2, centre, dims, D)
        if KIND == "box":
            middle = round_bfloat16(centre)
            # The factor makes up for the rounding of the subtractions.
            half = tl.maximum(high - middle, middle - low) * (1 + 2.0**-20)
            _put(to, 1, tl.where(broken, float("nan"), ceil_bfloat16(half)), dims, D)
        else:
            away = tl.where(live, tl.abs(x - centre[None, :]), 0.0)
            _put(to, VECTORS - 1, tl.sum(away, 0) / n, dims, D)


@triton.jit
def _vector(rows, vector, inside, dims, D: tl.constexpr):
    """Transposed tile float32 [DIMS, PAGES] of one vector of each page."""
    tile = tl.load(
        rows[:, None] + vector * D + dims[None, :],
        mask=inside[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    return tl.trans(tile.to(tl.float32))


@triton.jit
def score(
    q, summary, watermark, page_table, seq_lens, active, log_mass,
    q_row, q_head, table_row, M, scale,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, VECTORS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Estimates of a tile of pages. Grid (B * Hkv, tiles).

    Products split float32 into three tf32 parts: the estimates are those of float32.
    """
    r = tl.program_id(0).to(tl.int64)
    b, h = r // HKV, r % HKV
    length = tl.load(seq_lens + b)
    n = (length + PAGE - 1) // PAGE
    first = tl.program_id(1) * PAGES
    if (first < n) & (tl.load(active + b) != 0):
        g = tl.arange(0, GT)
        dims = tl.arange(0, DT)
        heads = (g < G)[:, None] & (dims < D)[None, :]
        at = q + b * q_row + (h * G + g)[:, None] * q_head + dims[None, :]
        x = tl.load(at, mask=heads, other=0.0).to(tl.float32) * scale
        page = first + tl.arange(0, PAGES)
        inside = page < n
        frame = tl.load(page_table + b * table_row + page, mask=inside, other=0).to(tl.int64)
        tokens = tl.minimum(length - page * PAGE, PAGE)
        covered = tl.load(watermark + frame, mask=inside, other=0) >= tokens
        size = tl.log(tl.maximum(tokens, 1).to(tl.float32))[None, :]
        rows = summary + (frame * HKV + h) * VECTORS * D
        spread = tl.zeros([GT, PAGES], tl.float32)
        if (KIND == "hybrid") | (KIND == "cuboid_mean") | (KIND == "box"):
            centre = _vector(rows, VECTORS - 2, inside, dims, D)
            radius = _vector(rows, VECTORS - 1, inside, dims, D)
            spread = tl.dot(x, centre, input_precision="tf32x3")
            spread = tl.dot(tl.abs(x), radius, spread, input_precision="tf32x3")
        if KIND == "box":
            spread += size
        if (KIND == "hybrid") | (KIND == "mean") | (KIND == "gaussian"):
            mean = _vector(rows, 0, inside, dims, D)
            normal = tl.dot(x, mean, input_precision="tf32x3")
            if KIND != "mean":
                variance = _vector(rows, 1, inside, dims, D)
                normal = tl.dot(0.5 * x * x, variance, normal, input_precision="tf32x3")
            normal += size
            spread = log_add(normal, spread) if KIND == "hybrid" else normal
        known = (spread < float("inf")) & covered[None, :]
        to = log_mass + (r * G + g)[:, None] * M + page[None, :]
        result = tl.where(known, spread, float("inf"))
        tl.store(to, result, mask=(g < G)[:, None] & inside[None, :])
