"""Triton kernel that sketches keys.

A tile [PLANES, WIDTH_T] holds a key in planar order: byte j is column j, lowest bits first.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.key_sketch.triton_layout import byte_place

#: Rounds float32 below 2^22 to the nearest integer, ties to even, when added and subtracted.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def transform(x, ROWS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Walsh-Hadamard transform of each row of [ROWS, SIZE], SIZE = 2^STEPS: sums and differences in
    the reference's order, so the result is the same bit for bit."""
    for step in tl.static_range(STEPS):
        y = tl.reshape(x, [ROWS * (SIZE >> (step + 1)), 2, 1 << step])
        first, second = tl.split(tl.permute(y, (0, 2, 1)))
        y = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
        x = tl.reshape(y, [ROWS, SIZE])
    return x


@triton.jit
def rotated_key(
    key, signs, D: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
    FACTOR: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, WIDTH_T: tl.constexpr,
):  # fmt: skip
    """The rotated key in planar order; places behind a plane's WIDTH hold anything."""
    d = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(key + d, mask=d < D, other=0.0).to(tl.float32)
    x *= tl.load(signs + d, mask=d < D, other=0.0)
    flat = tl.reshape(transform(x, ROWS, SIZE, STEPS) * FACTOR, [ROWS * SIZE])
    place = tl.arange(0, PLANES * WIDTH_T)
    element = place // WIDTH_T * WIDTH + tl.minimum(place % WIDTH_T, WIDTH - 1)
    if WIDTH == WIDTH_T:
        return tl.reshape(flat, [PLANES, WIDTH_T])
    return tl.reshape(tl.gather(flat, element, 0), [PLANES, WIDTH_T])


@triton.jit
def write(
    k, slots, signs, codes, affine, k_slot, k_head,
    BITS: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_T: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
    FACTOR: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Sketch one key and KV head. Grid (slots, Hkv)."""
    PLANES: tl.constexpr = 8 // BITS
    slot = tl.load(slots + tl.program_id(0))
    h = tl.program_id(1)
    plane = tl.arange(0, PLANES)[:, None]
    byte = tl.arange(0, WIDTH_T)[None, :]
    real = (byte < WIDTH) & (plane < PLANES)
    row = slot
    if IN_ORDER:
        row = tl.program_id(0)
    key = k + row * k_slot + h * k_head
    frame = slot // PAGE * HKV + h
    offset = slot % PAGE
    if ROTATED:
        x = rotated_key(
            key, signs, D, ROWS, SIZE, STEPS, FACTOR, PLANES, WIDTH, WIDTH_T
        )  # fmt: skip
        x = tl.where(real, x, 0.0)
        square = tl.sum(x * x)
        step = STEP * tl.sqrt(square / D)
        position = x * tl.where(step > 0, 1.0 / step, 0.0) + (1 << (BITS - 1))
        # No number and infinity have code 0.
        position = tl.where(tl.abs(position) < float("inf"), position, 0.0)
        code = tl.floor(tl.minimum(tl.maximum(position, 0.0), (1 << BITS) - 1.0))
        along = tl.sum((code - ((1 << BITS) - 1) / 2) * x)
        scale = tl.where(square == 0, 0.0, square / along).to(tl.float16).to(tl.float32)
        scale = tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))
        tl.store(affine + frame * PAGE + offset, scale.to(tl.float16))
    else:
        x = tl.load(key + plane * WIDTH + byte, mask=real, other=0.0).to(tl.float32)
        if BITS == 1:
            mean = tl.sum(x) / D
            deviation = tl.sum(tl.where(real, tl.abs(x - mean), 0.0)) / D
            zero = mean - deviation
            scale = 2 * deviation
        else:
            low = tl.min(tl.where(real, x, float("inf")))
            # Extremes pass NaN over: it is put back.
            broken = tl.max((x != x).to(tl.int32)) > 0
            zero = tl.where(broken, float("nan"), low)
            range_ = tl.max(tl.where(real, x, float("-inf"))) - zero
            scale = tl.div_rn(range_, ((1 << BITS) - 1) + range_ * 0.0)
        # Codes belong to the affine that is stored, not to the one before rounding.
        scale = scale.to(tl.float16)
        zero = zero.to(tl.float16)
        tl.store(affine + (frame * PAGE + offset) * 2, scale)
        tl.store(affine + (frame * PAGE + offset) * 2 + 1, zero)
        scale = scale.to(tl.float32)
        zero = zero.to(tl.float32)
        if BITS == 1:
            code = (x > zero + 0.5 * scale).to(tl.float32)
        else:
            position = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0) + x * 0.0)
            position = tl.where(scale > 0, position, 0.0)
            position = tl.where(position == position, position, 0.0)
            position = tl.minimum(tl.maximum(position, 0.0), (1 << BITS) - 1.0)
            code = (position + ROUND) - ROUND
    packed = tl.sum(code.to(tl.int32) << (BITS * plane), 0)
    column = tl.arange(0, WIDTH_T)
    at = codes + frame * PAGE * WIDTH + byte_place(offset, column, PAGE, WIDTH)
    tl.store(at, packed.to(tl.uint8), mask=column < WIDTH)
