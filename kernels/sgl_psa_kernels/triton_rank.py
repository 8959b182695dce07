"""Triton functions that find the largest of a row's numbers by bisection, without a sort.

Numbers are compared as integers in the order of the floats. Equal ones rank in the order of the
pages.
"""

import triton
import triton.language as tl

#: Key of what is no page to choose from, below that of every number.
NO_PAGE = tl.constexpr(-(2**31))
FIRST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """Integers in the order of float32 x; 0 and -0 are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number(key):
    """The float32 that ``ordered`` made ``key`` of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_behind(key, row, n, start, bound_key, bound_page, BLOCK: tl.constexpr):
    """(pages, keys) of a block; NO_PAGE for those that are not behind the bound in order."""
    page = start + tl.arange(0, BLOCK)
    x = tl.load(key + row + page, mask=page < n, other=NO_PAGE)
    behind = (x < bound_key) | ((x == bound_key) & (page > bound_page))
    return page, tl.where(behind, x, NO_PAGE)


@triton.jit
def at_least(key, row, n, least, bound_key, bound_page, BLOCK: tl.constexpr):
    """How many keys behind the bound are no less than ``least``."""
    count = n * 0
    for start in range(0, n, BLOCK):
        _, x = keys_behind(key, row, n, start, bound_key, bound_page, BLOCK)
        count += tl.sum((x >= least).to(tl.int32), 0)
    return count


@triton.jit
def largest(key, row, n, wanted, there, bound_key, bound_page, BLOCK: tl.constexpr):
    """(least key, how many pages of just that key) of the ``wanted`` largest of the ``there`` keys
    behind the bound."""
    low = n * 0 + (NO_PAGE + 1)
    high = n * 0 + bound_key
    reach = n * 0 + there
    while (reach != wanted) & (low < high):
        middle = (low | high) - ((low ^ high) >> 1)
        count = at_least(key, row, n, middle, bound_key, bound_page, BLOCK)
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, count, reach)
        high = tl.where(enough, high, middle - 1)
    equal = n
    if reach != wanted:
        # What is above fits with room to spare; low + 1 is no overflow, for low <= bound_key.
        above = n * 0
        for start in range(0, n, BLOCK):
            _, x = keys_behind(key, row, n, start, bound_key, bound_page, BLOCK)
            above += tl.sum((x > low).to(tl.int32), 0)
        equal = wanted - above
    return low, equal
