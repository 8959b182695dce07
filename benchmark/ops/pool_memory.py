"""What the memory of a pool is worth: the same ops on pools that differ in one thing, in turn.

    python -m benchmark.ops.pool_memory huge_pages|heads_apart [--in-order] --contexts 65536

huge_pages: the pool without them is allocated in the same way while Linux gives the process none
(``PR_SET_THP_DISABLE``). heads_apart: without, the heads of a token lie side by side. The pages of
a request are scattered, as those of a pool that has been in use for long, or in order.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import torch

from benchmark.common import integers, write_rows
from benchmark.ops import decode, scoring
from benchmark.ops.__main__ import FLUSH_BYTES
from benchmark.ops.measure import measure
from benchmark.ops.op import Op
from benchmark.ops.setting import Setting

_PR_SET_THP_DISABLE = 41
_SCORED = ("sketch_score_two_level", "sketch_score_sketch_2_bit")


def forbid(forbidden: bool) -> None:
    """Whether memory that this process touches from now on has small pages only.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_THP_DISABLE, int(forbidden), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_THP_DISABLE) failed")


def _ops(s: Setting) -> list[Op]:
    return [*decode.ops(s), *(op for op in scoring.ops(s) if op.name in _SCORED)]


def without(name: str, context: int, batch: int, in_order: bool) -> Setting:
    """A setting that lacks ``name``."""
    if name == "heads_apart":
        return Setting(context, batch, heads_apart=False, in_order=in_order)
    forbid(True)
    try:
        return Setting(context, batch, in_order=in_order)
    finally:
        forbid(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["huge_pages", "heads_apart"])
    parser.add_argument("--in-order", action="store_true", help="a request's pages are")
    parser.add_argument("--contexts", type=integers, default=[16384, 65536])
    parser.add_argument("--batches", type=integers, default=[1])
    parser.add_argument("--threads", type=integers, default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    flush = torch.ones(FLUSH_BYTES, dtype=torch.uint8)
    path = options.out / f"bench_pool_{options.name}.json"
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        for batch in options.batches:
            lacking = without(options.name, context, batch, options.in_order)
            having = Setting(context, batch, in_order=options.in_order)
            ops = [*_ops(lacking), *_ops(having)]
            count = len(ops) // 2
            for threads in options.threads:
                found = measure(lacking, ops, threads=threads, rounds=options.rounds, flush=flush)
                for before, after in zip(found[:count], found[count:], strict=True):
                    ratio = before["ms_median"] / after["ms_median"]
                    rows += [
                        {**before, options.name: False, "speedup": 1.0},
                        {**after, options.name: True, "speedup": ratio},
                    ]
                    print(
                        f"{context} x {batch}, {threads} threads, {before['op']:34}"
                        f"{before['ms_median']:9.3f} -> {after['ms_median']:9.3f} ms  "
                        f"{ratio:.3f}x",
                        flush=True,
                    )
                write_rows(path, rows)
            del lacking, having, ops
    print(path)


if __name__ == "__main__":
    main()
