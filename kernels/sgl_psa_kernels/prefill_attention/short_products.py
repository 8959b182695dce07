"""Attention of many rows whose products of bf16 numbers are exact and summed in float32.

oneDNN multiplies float32 matrices by instructions for bf16 if it is told so. Queries, keys and
values are bf16 numbers, which lose nothing; weights are rounded to bf16 for their product with the
values, as FlashAttention does (arXiv 2205.14135). On CPUs with fast AVX512-BF16 this is faster than
torch's attention, which does not use those instructions. The softmax scale must be positive.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

#: Query rows, of all heads of a group, and keys that are multiplied at once.
ROWS, KEYS = 1024, 512
#: What this way must save over another one.
_GAIN = 1.2

#: Of queries [S, Hkv, G, D] over keys and values [n, Hkv, D]: out like the queries, in float32 or
#: their dtype, and lse float32 [S, Hkv, G].
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]


def causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query i over keys 0..i; all bf16. Returns out float32 [S, Hkv, G, D] and lse [S, Hkv, G]."""
    return _attend(q, k, v, sm_scale, is_causal=True)


def all_seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query over every key; otherwise as :func:`causal`."""
    return _attend(q, k, v, sm_scale, is_causal=False)


@cache
def faster_than(other: Attend) -> bool:
    """Whether :func:`all_seen` takes clearly less time than ``other``: measured once a process, on
    1024 rows and 2048 keys, some 100 ms."""
    flags = torch.backends.mkldnn
    if not flags.is_available() or not hasattr(flags, "matmul"):
        return False
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(512, 1, 2, 128, generator=rng).bfloat16()
    k = torch.randn(2048, 1, 128, generator=rng).bfloat16()
    times: dict[Attend, list[float]] = {all_seen: [], other: []}
    for _ in range(5):
        for attend, mine in times.items():
            begin = time.perf_counter()
            attend(q, k, k, 0.1)
            mine.append(time.perf_counter() - begin)
    return min(times[other]) > _GAIN * min(times[all_seen])


@contextmanager
def _products_in_bf16() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    new, num_kv_heads, group, dim = q.shape
    out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:3])
    step = max(1, ROWS // group)
    with _products_in_bf16():
        for head in range(num_kv_heads):
            keys, values = k[:, head].float(), v[:, head].float()
            for begin in range(0, new, step):
                end = min(begin + step, new)
                rows = q[begin:end, head].float().reshape(-1, dim)
                last = torch.arange(begin, end).repeat_interleave(group) if is_causal else None
                seen = end if is_causal else len(keys)
                o, log_sum = _rows(rows, keys[:seen], values[:seen], sm_scale, last)
                out[begin:end, head] = o.view(-1, group, dim)
                lse[begin:end, head] = log_sum.view(-1, group)
    return out, lse


def _rows(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sm_scale: float,
    last: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An online softmax over blocks of keys.

    Args:
        last: the last key that each row sees, int64 [rows]; None: all.
    """
    top = torch.full((len(q), 1), float("-inf"))
    total, acc = torch.zeros(len(q), 1), torch.zeros(len(q), values.shape[1])
    for begin in range(0, len(keys), KEYS):
        block = slice(begin, begin + KEYS)
        weights = q @ keys[block].T
        end = begin + weights.shape[1]
        if last is not None and end > int(last[0]) + 1:
            weights.masked_fill_(torch.arange(begin, end) > last[:, None], float("-inf"))
        before, top = top, torch.maximum(top, weights.amax(1, keepdim=True).mul_(sm_scale))
        torch.add(-top, weights, alpha=sm_scale, out=weights).exp_()
        shrink = (before - top).exp_()
        total = total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        acc.mul_(shrink).addmm_(weights, values[block])
    return acc.div_(total), top.add_(total.log_())
