"""What huge pages of memory are worth: the same ops on a pool with them and on one without.

    python -m benchmark.ops.huge_pages --contexts 65536 --batches 1

Without: allocated in the same way while Linux gives the process none (``PR_SET_THP_DISABLE``).
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=integers, default=[16384, 65536])
    parser.add_argument("--batches", type=integers, default=[1])
    parser.add_argument("--threads", type=integers, default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out/bench_huge_pages.json"))
    options = parser.parse_args()
    flush = torch.ones(FLUSH_BYTES, dtype=torch.uint8)
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        for batch in options.batches:
            forbid(True)
            small = Setting(context, batch)
            ops = _ops(small)
            forbid(False)
            huge = Setting(context, batch)
            count = len(ops)
            ops += _ops(huge)
            for threads in options.threads:
                found = measure(small, ops, threads=threads, rounds=options.rounds, flush=flush)
                for without, with_them in zip(found[:count], found[count:], strict=True):
                    ratio = without["ms_median"] / with_them["ms_median"]
                    rows += [
                        {**without, "huge_pages": False, "speedup": 1.0},
                        {**with_them, "huge_pages": True, "speedup": ratio},
                    ]
                    print(
                        f"{context} x {batch}, {threads} threads, {without['op']:34}"
                        f"{without['ms_median']:9.3f} -> {with_them['ms_median']:9.3f} ms  "
                        f"{ratio:.3f}x",
                        flush=True,
                    )
                write_rows(options.out, rows)
            del small, huge, ops
    print(options.out)


if __name__ == "__main__":
    main()
