"""Every op of a decode step, side by side with torch's and with the machine's bandwidth.

    python -m benchmark.ops [--quick]

32 query and 8 KV heads of 128, bf16, pages of 16. ``ms_median`` is wall time a layer (CPU time of
the process is beside it), medians of interleaved rounds, caches cold. ``gbps`` counts the bytes
that the op must read, ``bytes_counted`` says which: torch_native, which also copies them, counts
them once. Scores of the default rule and of coverage 0.95; keys: see ``keys.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmark.common import integers, write_rows
from benchmark.ops import decode, peers, report, scoring
from benchmark.ops.measure import measure
from benchmark.ops.setting import Setting

GROUPS = {"peers": peers.ops, "decode": decode.ops, "scoring": scoring.ops}
FLUSH_BYTES = 640 << 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=integers, default=[4096, 16384, 65536])
    parser.add_argument("--batches", type=integers, default=[1, 4])
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument(
        "--in-order",
        action="store_true",
        help="a request's pages follow each other, as a server's first ones do; default: scattered",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(GROUPS), action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="4k, batch 1, one thread, 3 rounds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.contexts, options.batches, options.threads = [4096], [1], [1]
        options.rounds = 3
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    flush = torch.ones(FLUSH_BYTES, dtype=torch.uint8)
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        for batch in options.batches:
            s = Setting(context, batch, in_order=options.in_order)
            ops = [op for name in options.only or GROUPS for op in GROUPS[name](s)]
            for threads in options.threads:
                found = measure(s, ops, threads=threads, rounds=options.rounds, flush=flush)
                rows += found
                write_rows(options.out / "bench_ops.json", rows)
                print(report.markdown(found), flush=True)
            del s, ops
    (options.out / "bench_ops.md").write_text(report.markdown(rows))
    report.plot(rows, options.out / "bench_ops.png")
    print(options.out / "bench_ops.json")


if __name__ == "__main__":
    main()
