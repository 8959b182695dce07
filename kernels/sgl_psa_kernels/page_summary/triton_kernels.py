"""Triton kernels of page summaries."""

import triton
import triton.language as tl

from sgl_psa_kernels.page_summary import storage
from sgl_psa_kernels.triton_tiles import ceil_bfloat16, floor_bfloat16, log_add, round_bfloat16

MARGIN = tl.constexpr(storage.MARGIN)
TOP = tl.constexpr(float(storage.TOP))
LEAST_SCALE = tl.constexpr(storage.LEAST_SCALE)
#: Rounds float32 below 2^22 to the nearest integer, ties to even, when added and subtracted.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _put(summary, vector, x, dims, D: tl.constexpr):
    rounded = round_bfloat16(x).to(tl.bfloat16)
    tl.store(summary + vector * D + dims, rounded, mask=dims < D)


@triton.jit
def _put_codes(summary, affine, vector, x, dims, D: tl.constexpr, UP: tl.constexpr):
    """Store x in 8 bits an element, as :func:`sgl_psa_kernels.page_summary.storage.encode`; returns
    it as stored."""
    real = dims < D
    finite = tl.min(tl.where(real & ((tl.abs(x) < float("inf")) == 0), 0, 1), 0) > 0
    zero = floor_bfloat16(tl.min(tl.where(real, x, float("inf")), 0))
    span = tl.max(tl.where(real, x, float("-inf")), 0) - zero
    scale = ceil_bfloat16(tl.maximum(tl.div_rn(span, TOP + span * 0.0) * MARGIN, LEAST_SCALE))
    scale = tl.where(finite & (scale < float("inf")), scale, float("nan"))
    position = tl.div_rn(x - zero, scale + x * 0.0)
    position = tl.where(position == position, position, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), TOP)
    code = tl.ceil(position) if UP else (position + ROUND) - ROUND
    tl.store(summary + vector * D + dims, code.to(tl.uint8), mask=real)
    tl.store(affine + vector * 2, scale.to(tl.bfloat16))
    tl.store(affine + vector * 2 + 1, zero.to(tl.bfloat16))
    return zero + scale * code


@triton.jit
def _store(summary, affine, vector, x, dims, D: tl.constexpr, CODES: tl.constexpr):
    if CODES:
        _put_codes(summary, affine, vector, x, dims, D, UP=False)
    else:
        _put(summary, vector, x, dims, D)


@triton.jit
def update(
    k, pages, fill, summary, affine, k_slot, k_head,
    HKV: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGE: tl.constexpr,
    VECTORS: tl.constexpr, KIND: tl.constexpr, CODES: tl.constexpr,
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
    pairs = affine
    if CODES:
        pairs = affine + (page * HKV + h) * VECTORS * 2
    # Maxima pass NaN over: it is put back.
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    if (KIND == "hybrid") | (KIND == "mean") | (KIND == "gaussian"):
        mean = tl.sum(x, 0) / n
        _store(to, pairs, 0, mean, dims, D, CODES)
        if KIND != "mean":
            away = tl.where(live, x - mean[None, :], 0.0)
            _store(to, pairs, 1, tl.sum(away * away, 0) / n, dims, D, CODES)
    if (KIND == "hybrid") | (KIND == "cuboid_mean") | (KIND == "box"):
        low = tl.where(broken, float("nan"), tl.min(tl.where(live, x, float("inf")), 0))
        high = tl.where(broken, float("nan"), tl.max(tl.where(live, x, float("-inf")), 0))
        centre = (low + high) / 2
        if KIND == "box":
            if CODES:
                middle = _put_codes(to, pairs, 0, centre, dims, D, UP=False)
            else:
                middle = round_bfloat16(centre)
                _put(to, 0, middle, dims, D)
            # The factor makes up for the rounding of the subtractions.
            half = tl.maximum(high - middle, middle - low) * MARGIN
            half = tl.where(broken, float("nan"), half)
            if CODES:
                _put_codes(to, pairs, 1, half, dims, D, UP=True)
            else:
                _put(to, 1, ceil_bfloat16(half), dims, D)
        else:
            _store(to, pairs, VECTORS - 2, centre, dims, D, CODES)
            away = tl.where(live, tl.abs(x - centre[None, :]), 0.0)
            _store(to, pairs, VECTORS - 1, tl.sum(away, 0) / n, dims, D, CODES)


@triton.jit
def _vector(rows, pairs, vector, inside, dims, D: tl.constexpr, CODES: tl.constexpr):
    """Transposed tile float32 [DIMS, PAGES] of one vector of each page."""
    tile = tl.load(
        rows[:, None] + vector * D + dims[None, :],
        mask=inside[:, None] & (dims < D)[None, :],
        other=0,
    ).to(tl.float32)
    if CODES:
        scale = tl.load(pairs + vector * 2, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(pairs + vector * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        tile = tl.where((dims < D)[None, :], zero[:, None] + scale[:, None] * tile, 0.0)
    return tl.trans(tile)


@triton.jit
def score(
    q, summary, affine, watermark, page_table, seq_lens, active, log_mass,
    q_row, q_head, table_row, M, scale,
    HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, VECTORS: tl.constexpr, KIND: tl.constexpr,
    CODES: tl.constexpr,
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
        pairs = frame
        if CODES:
            pairs = affine + (frame * HKV + h) * VECTORS * 2
        spread = tl.zeros([GT, PAGES], tl.float32)
        if (KIND == "hybrid") | (KIND == "cuboid_mean") | (KIND == "box"):
            centre = _vector(rows, pairs, VECTORS - 2, inside, dims, D, CODES)
            radius = _vector(rows, pairs, VECTORS - 1, inside, dims, D, CODES)
            spread = tl.dot(x, centre, input_precision="tf32x3")
            spread = tl.dot(tl.abs(x), radius, spread, input_precision="tf32x3")
        if KIND == "box":
            spread += size
        if (KIND == "hybrid") | (KIND == "mean") | (KIND == "gaussian"):
            mean = _vector(rows, pairs, 0, inside, dims, D, CODES)
            normal = tl.dot(x, mean, input_precision="tf32x3")
            if KIND != "mean":
                variance = _vector(rows, pairs, 1, inside, dims, D, CODES)
                normal = tl.dot(0.5 * x * x, variance, normal, input_precision="tf32x3")
            normal += size
            spread = log_add(normal, spread) if KIND == "hybrid" else normal
        known = (spread < float("inf")) & covered[None, :]
        to = log_mass + (r * G + g)[:, None] * M + page[None, :]
        result = tl.where(known, spread, float("inf"))
        tl.store(to, result, mask=(g < G)[:, None] & inside[None, :])
