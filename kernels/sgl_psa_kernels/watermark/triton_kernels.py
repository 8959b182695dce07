"""Triton kernel of watermarks."""

import triton
import triton.language as tl


@triton.jit
def advance(watermark, slots, N, PAGE: tl.constexpr, BACK: tl.constexpr):
    """The run that ends at a slot, if one does, by a look at the slots before it. Grid (N,)."""
    i = tl.program_id(0)
    slot = tl.load(slots + i)
    offset = slot % PAGE
    following = tl.load(slots + i + 1, mask=i + 1 < N, other=-1)
    if (following != slot + 1) | (offset == PAGE - 1):
        back = tl.arange(0, BACK)
        before = tl.load(slots + i - back, mask=back <= i, other=-1)
        mine = (before == slot - back) & (back <= offset)
        length = tl.min(tl.where(mine, BACK, back), 0)
        start = offset + 1 - length
        page = slot // PAGE
        if (start == 0) | (tl.load(watermark + page) >= start):
            tl.store(watermark + page, (offset + 1).to(tl.int32))
