"""Where the bytes of a packed key lie: the one place of the Triton kernels that knows."""

import triton
import triton.language as tl


@triton.jit
def byte_place(offset, byte, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Place of a key's byte among the ``PAGE * WIDTH`` of its page and KV head.

    Args:
        offset: place of the key in its page; ``byte``: 0 .. WIDTH - 1. They broadcast.
        PAGE, WIDTH: tokens of a page and bytes of a packed key, known when compiling.
    """
    return offset * WIDTH + byte
