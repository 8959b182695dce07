"""Where the bytes of a packed key lie: the one place of the Triton kernels that knows."""

import triton
import triton.language as tl

from sgl_psa_kernels.key_sketch import packing

TILE_TOKENS = tl.constexpr(packing.TILE_TOKENS)
COLUMN_BYTES = tl.constexpr(packing.COLUMN_BYTES)


@triton.jit
def byte_place(offset, byte, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Place of a key's byte among the ``PAGE * WIDTH`` of its page and KV head, as in
    :func:`sgl_psa_kernels.key_sketch.packing.byte_places`.

    Args:
        offset: place of the key in its page; ``byte``: 0 .. WIDTH - 1. They broadcast.
        PAGE, WIDTH: tokens of a page and bytes of a packed key, known when compiling.
    """
    TILE: tl.constexpr = TILE_TOKENS if PAGE > TILE_TOKENS else PAGE
    column = byte // COLUMN_BYTES * COLUMN_BYTES  # its first byte
    token = offset % TILE * tl.minimum(WIDTH - column, COLUMN_BYTES) + byte - column
    return offset // TILE * (TILE * WIDTH) + TILE * column + token
