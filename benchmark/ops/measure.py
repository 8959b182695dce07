"""Medians of interleaved rounds, from cold caches."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmark.ops.op import Op, compare, row
from benchmark.ops.setting import Setting
from benchmark.ops.stream import stream_read

#: A run of calls of one op, within a round, takes about so long.
_CALLS_S = 0.1


def measure(
    s: Setting, ops: list[Op], *, threads: int, rounds: int, flush: torch.Tensor
) -> list[dict[str, Any]]:
    """One row an op. In every round each op runs over several layers, none of them twice.

    Args:
        flush: read before each op, so that nothing is left of the op's memory in the caches.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    wall: list[list[float]] = [[] for _ in ops]
    cpu: list[list[float]] = [[] for _ in ops]
    try:
        calls = [_calls(op, s.layers) for op in ops]
        for turn in range(rounds):
            for i, op in enumerate(ops):
                stream_read(flush)
                first = turn * calls[i]
                cpu_begin, begin = time.process_time(), time.perf_counter()
                for call in range(calls[i]):
                    op.call((first + call) % s.layers)
                wall[i].append((time.perf_counter() - begin) * 1e3 / calls[i])
                cpu[i].append((time.process_time() - cpu_begin) * 1e3 / calls[i])
    finally:
        torch.set_num_threads(before)
    rows = [
        row(op, s, threads, statistics.median(wall[i]), statistics.median(cpu[i]), rounds)
        for i, op in enumerate(ops)
    ]
    compare(rows, ops)
    return rows


def _calls(op: Op, layers: int) -> int:
    """How many layers an op runs over in a round; warms it up."""
    op.call(0)
    begin = time.perf_counter()
    op.call(layers - 1)
    return min(layers, max(1, int(_CALLS_S / (time.perf_counter() - begin + 1e-9))))
