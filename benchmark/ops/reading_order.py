"""Why attention takes the rows of several pages in turn: how fast scattered pages can be read.

    python -m benchmark.ops.reading_order

Pages are the 4 KB of 16 tokens of a head, rows its 256 bytes of a token. All memory in sequence,
pages in random order one after the other, and a row of each of 2, 4 or 8 such pages in turn;
nothing is computed. Rows are requested a number of rows ahead, or not at all (0).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmark.common import write_rows
from benchmark.ops.stream import LINE, read_rows
from sgl_psa.huge_pages import zero_in_huge_pages

MEMORY_BYTES = 1 << 30
PAGE_ROWS, ROW_BYTES = 16, 256
#: Pages that a run takes.
TAKEN = 65536
IN_TURN = (1, 2, 4, 8)
AHEAD = (0, 16, 32, 64)


def rows_of(pages: torch.Tensor, in_turn: int) -> torch.Tensor:
    """Where the rows of ``pages`` begin, those of ``in_turn`` pages by turns."""
    row = torch.arange(PAGE_ROWS) * ROW_BYTES
    begins = pages.view(-1, 1, in_turn) * (PAGE_ROWS * ROW_BYTES) + row[:, None]
    return begins.flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench_reading_order.json"))
    options = parser.parse_args()
    memory = torch.empty(MEMORY_BYTES + LINE, dtype=torch.uint8)
    zero_in_huge_pages(memory)
    memory.fill_(1)
    memory = memory[-memory.data_ptr() % LINE :]
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randperm(MEMORY_BYTES // (PAGE_ROWS * ROW_BYTES), generator=rng)[:TAKEN]
    orders = {f"scattered, {n} in turn": rows_of(drawn, n) for n in IN_TURN}
    orders = {"in sequence": rows_of(torch.arange(TAKEN), 1), **orders}
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for name, rows in orders.items():
            for ahead in AHEAD:
                begin = time.perf_counter()
                read_rows(memory, rows, ahead=ahead)
                spent = time.perf_counter() - begin
                speeds.setdefault((name, ahead), []).append(len(rows) * ROW_BYTES / spent / 1e9)
    found: list[dict[str, Any]] = [
        {"order": name, "rows_ahead": ahead, "gbps": statistics.median(mine)}
        for (name, ahead), mine in speeds.items()
    ]
    write_rows(options.out, found)
    for row in found:
        print(f"{row['order']:24}{row['rows_ahead']:4} ahead{row['gbps']:8.1f} GB/s")
    print(options.out)


if __name__ == "__main__":
    main()
