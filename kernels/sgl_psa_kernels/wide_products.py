"""Whether this CPU multiplies large 16-bit matrices faster in float32.

Without AMX a 16-bit product can run at half the speed of the float32 one: it has no more
multiplications an instruction, and its operands are rearranged first. Products of 16-bit numbers
are exact in float32, so nothing is lost but memory for the copies.
"""

import time
from functools import cache

import torch

#: Rows from which converting the other operand is repaid.
MIN_ROWS = 128
#: What the float32 way must save.
_GAIN = 1.15


@cache
def faster_in_float32(dtype: torch.dtype) -> bool:
    """Measured once a process, on a product of 256 x 1024 x 1024: a few milliseconds."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    short, wide = [], []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        middle = time.perf_counter()
        torch.nn.functional.linear(x.float(), weight.float()).to(dtype)
        short.append(middle - start)
        wide.append(time.perf_counter() - middle)
    return min(short) > _GAIN * min(wide)
