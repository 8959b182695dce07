"""Pages in int8 under shared powers of two, in Triton: ``page_tier/codec.py`` on tiles.

A record is the keys' elements [HKV, PAGE, D], the values', the keys' exponents [HKV, D] and the
values' [HKV, PAGE]. Tiles of pages hold PAGES pages of PART tokens each, as in ``triton_tiles``.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.page_tier import codec

LARGEST = tl.constexpr(codec.LARGEST)
NOT_FINITE = tl.constexpr(codec.NOT_FINITE)
#: float32 whose unit is 1: what it is added to is rounded to an integer, half to even.
ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def power(e):
    """2^e in float32, e int32 in -126..127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit(e):
    """What an element 1 of exponent e int8 stands for: 2^e in float32, or NaN."""
    e = e.to(tl.int32)
    lost = e == NOT_FINITE
    return tl.where(lost, float("nan"), power(tl.where(lost, 0, e)))


@triton.jit
def encode(x, AXIS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Blocks of a tile [M, N] along AXIS as int8 [M, N] and exponents int8; see
    ``codec.quantise``. LOW, HIGH: ``codec.EXPONENTS`` of x's type."""
    x = x.to(tl.float32)
    # Magnitudes are in the order of their bits, those of infinity and NaN behind all others.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    # 1.f * 2^(exponent - 127); from 127.5 / 64 on, 2^(exponent - 133) would round to 128.
    e = (largest >> 23) - 133 + ((largest & 0x7FFFFF) >= 0x7F0000).to(tl.int32)
    e = tl.minimum(tl.maximum(e, LOW), HIGH)
    lost = (largest >> 23) == 255
    down = tl.expand_dims(power(tl.where(lost, 0, -e)), AXIS)
    scaled = tl.where(tl.expand_dims(lost, AXIS), 0.0, x * down)
    scaled = (scaled + ROUNDER) - ROUNDER
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    return scaled.to(tl.int32).to(tl.int8), tl.where(lost, NOT_FINITE, e).to(tl.int8)


@triton.jit
def decode_keys(
    codes, begin, offset, live, h, dims,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Keys float32 [PAGES * PART, DIMS] of a KV head; 0 where not ``live``, and behind D.

    Args:
        codes: int8 pointer.
        begin: int64 [PAGES * PART], where the record of a token's page begins, in bytes; the
            same for all tokens of a page.
        offset: [PAGES * PART], the token's place in its page.
    """
    real = dims < D
    at = begin + (h * PAGE + offset) * D
    elements = tl.load(
        codes + at[:, None] + dims[None, :], mask=live[:, None] & real[None, :], other=0
    )
    # Once a page: exponents come through the link too.
    first = tl.max(tl.reshape(begin, [PAGES, PART]), 1) + (2 * HKV * PAGE + h) * D
    some = tl.max(tl.reshape(live.to(tl.int32), [PAGES, PART]), 1) > 0
    exponents = tl.load(
        codes + first[:, None] + dims[None, :], mask=some[:, None] & real[None, :], other=0
    )
    units = tl.broadcast_to(unit(exponents)[:, None, :], [PAGES, PART, dims.shape[0]])
    return elements.to(tl.float32) * tl.reshape(units, [PAGES * PART, dims.shape[0]])


@triton.jit
def decode_values(
    codes, begin, offset, live, h, dims,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """As :func:`decode_keys`, values."""
    real = live[:, None] & (dims < D)[None, :]
    at = begin + ((HKV + h) * PAGE + offset) * D
    elements = tl.load(codes + at[:, None] + dims[None, :], mask=real, other=0)
    at = begin + (2 * PAGE + 1) * HKV * D + h * PAGE + offset
    exponents = tl.load(codes + at, mask=live, other=0)
    return elements.to(tl.float32) * unit(exponents)[:, None]
