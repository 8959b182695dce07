"""Triton functions on tiles that several operators share.

Tiles of pages hold ``PAGES`` pages of ``PART`` tokens each (a page longer than a tile comes in
several parts). An empty maximum is -inf; ``finite`` replaces it where it is subtracted.
"""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """x with 0 for -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b)); -inf where both are."""
    base = finite(tl.maximum(a, b))
    return base + tl.log(tl.exp(a - base) + tl.exp(b - base))


@triton.jit
def log_sum(x):
    """Log-sum-exp over the last axis of a tile [N, M]; -inf where all are."""
    base = finite(tl.max(x, 1))
    return base + tl.log(tl.sum(tl.exp(x - base[:, None]), 1))


@triton.jit
def page_masses(logits, PAGES: tl.constexpr, PART: tl.constexpr):
    """Log masses [HEADS, PAGES] of the logits [HEADS, PAGES * PART] of a tile of pages."""
    split = tl.reshape(logits, [logits.shape[0], PAGES, PART])
    base = finite(tl.max(split, 2))
    return base + tl.log(tl.sum(tl.exp(split - base[:, :, None]), 2))


@triton.jit
def tile_rows(x, slots, live, dims, D: tl.constexpr, stride):
    """Rows [TOKENS, DIMS] at ``slots``, ``stride`` elements from slot to slot; 0 where not ``live``
    and behind D."""
    mask = live[:, None] & (dims < D)[None, :]
    return tl.load(x + slots[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def tile_logits(q, keys, live, scale, PRECISION: tl.constexpr):
    """Logits [HEADS, TOKENS] of keys [TOKENS, DIMS], -inf where not ``live``.

    Args:
        q: [HEADS, DIMS], 0 behind D; its type is that of the product.
    """
    logits = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision=PRECISION) * scale
    return tl.where(live[None, :], logits, float("-inf"))


@triton.jit
def absorb(logits, values, top, total, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax: (top [HEADS], total [HEADS], acc [HEADS, DIMS]) with a tile of values
    [TOKENS, DIMS] taken in."""
    new = tl.maximum(top, tl.max(logits, 1))
    base = finite(new)
    weights = tl.exp(logits - base[:, None])
    fade = tl.exp(top - base)
    total = total * fade + tl.sum(weights, 1)
    product = tl.dot(weights.to(DOT), values.to(DOT), input_precision=PRECISION)
    return new, total, acc * fade[:, None] + product


@triton.jit
def add_moments(count, mean, square, x, known):
    """Moments [HEADS] (number, mean, sum of squared distances) with x [HEADS, PAGES] added where
    ``known``: Chan's update, stable in float32."""
    n = tl.sum(known.to(tl.float32), 1)
    here = tl.sum(tl.where(known, x, 0.0), 1) / tl.maximum(n, 1.0)
    away = tl.where(known, x - here[:, None], 0.0)
    distance = here - mean
    both = tl.maximum(count + n, 1.0)
    square += tl.sum(away * away, 1) + distance * distance * count * n / both
    return count + n, mean + distance * n / both, square


@triton.jit
def load_moments(x, mask, G: tl.constexpr):
    """Moments that lie G elements apart, the first at ``x``; 0 where not ``mask``."""
    number = tl.load(x, mask=mask, other=0.0)
    return number, tl.load(x + G, mask=mask, other=0.0), tl.load(x + 2 * G, mask=mask, other=0.0)


@triton.jit
def store_moments(x, number, mean, square, mask, G: tl.constexpr):
    """Put moments where :func:`load_moments` finds them."""
    tl.store(x, number, mask=mask)
    tl.store(x + G, mean, mask=mask)
    tl.store(x + 2 * G, square, mask=mask)


@triton.jit
def correction(count, mean, square, deviations, floor):
    """kappa [HEADS]: mean + deviations * standard deviation, 0 of nothing, at least floor."""
    spread = tl.sqrt(square / tl.maximum(count, 1.0))
    return tl.maximum(tl.where(count > 0, mean + deviations * spread, 0.0), floor)


@triton.jit
def round_bfloat16(x):
    """float32 x rounded to the nearest bfloat16, ties to even, as float32; NaN stays.

    A plain cast does so on a GPU, but the interpreter's truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))


@triton.jit
def ceil_bfloat16(x):
    """Smallest bfloat16 that is no less than float32 x >= 0, as float32; NaN stays."""
    bits = (x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))


@triton.jit
def floor_bfloat16(x):
    """Largest bfloat16 that is no more than float32 x, as float32; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x < 0, bits + 0xFFFF, bits) & -0x10000
    return tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
