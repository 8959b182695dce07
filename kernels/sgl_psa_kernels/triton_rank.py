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
def at_least(
    key, row, n, least, step, bound_key, bound_page, BLOCK: tl.constexpr
):  # fmt: skip
    """How many keys behind the bound are no less than ``least``, ``least + step`` and ``least +
    2 * step``, int64; a threshold behind the largest integer has none."""
    one = n * 0
    two = n * 0
    three = n * 0
    last = tl.minimum(least + 2 * step, FIRST_KEY)
    middle = tl.minimum(least + step, FIRST_KEY)
    for start in range(0, n, BLOCK):
        _, x = keys_behind(key, row, n, start, bound_key, bound_page, BLOCK)
        one += tl.sum((x >= least.to(tl.int32)).to(tl.int32), 0)
        two += tl.sum((x >= middle.to(tl.int32)).to(tl.int32), 0)
        three += tl.sum((x >= last.to(tl.int32)).to(tl.int32), 0)
    two = tl.where(least + step > FIRST_KEY, 0, two)
    three = tl.where(least + 2 * step > FIRST_KEY, 0, three)
    return one, two, three


@triton.jit
def largest(key, row, n, wanted, there, bound_key, bound_page, BLOCK: tl.constexpr):
    """(least key, how many pages of just that key) of the ``wanted`` largest of the ``there`` keys
    behind the bound. A pass over the keys leaves a quarter of the integers."""
    low = (n * 0).to(tl.int64) + (NO_PAGE + 1)
    high = (n * 0).to(tl.int64) + bound_key
    reach = n * 0 + there
    while (reach != wanted) & (low < high):
        step = (high - low + 3) // 4
        one, two, three = at_least(
            key, row, n, low + step, step, bound_key, bound_page, BLOCK
        )  # fmt: skip
        if three >= wanted:
            low += 3 * step
            reach = three
        elif two >= wanted:
            low += 2 * step
            high = low + step - 1
            reach = two
        elif one >= wanted:
            low += step
            high = low + step - 1
            reach = one
        else:
            high = low + step - 1
    equal = n
    if reach != wanted:
        above = n * 0
        for start in range(0, n, BLOCK):
            _, x = keys_behind(key, row, n, start, bound_key, bound_page, BLOCK)
            above += tl.sum((x > low.to(tl.int32)).to(tl.int32), 0)
        equal = wanted - above
    return low.to(tl.int32), equal
