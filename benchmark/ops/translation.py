"""Why the heads of a pool lie apart: prefetches of scattered rows keep arithmetic waiting.

    python -m benchmark.ops.translation

Rows are the 256 bytes of one token and head. ``beside``: 16 rows of a head, 2 KB apart, from every
page of 32 KB. ``apart``: 16 rows that follow each other. Pages come in random order. Prefetches
alone, products alone, and both; where they overlap, both take hardly longer than the longer one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmark.common import write_rows
from benchmark.ops.stream import prefetch_rows
from sgl_psa.huge_pages import zero_in_huge_pages

MEMORY_BYTES = 1 << 30
PAGE_TOKENS, HEADS, ROW_BYTES = 16, 8, 256
#: Pages of a head that a run takes.
TAKEN = 4096
CASES = {"prefetches": (True, False), "products": (False, True), "both": (True, True)}


def rows_of(layout: str, rng: torch.Generator) -> torch.Tensor:
    """Where rows begin, of pages of heads drawn from all memory."""
    block = PAGE_TOKENS * ROW_BYTES
    drawn = torch.randperm(MEMORY_BYTES // block, generator=rng)[:TAKEN, None]
    token = torch.arange(PAGE_TOKENS)
    if layout == "apart":
        return (drawn * block + token * ROW_BYTES).flatten()
    page, head = drawn // HEADS, drawn % HEADS
    return (page * block * HEADS + (token * HEADS + head) * ROW_BYTES).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("out/bench_translation.json"))
    options = parser.parse_args()
    memory = torch.empty(MEMORY_BYTES, dtype=torch.uint8)
    zero_in_huge_pages(memory)
    memory.fill_(1)
    rng = torch.Generator().manual_seed(0)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for layout in ("beside", "apart"):
            for name, (prefetch, products) in CASES.items():
                rows = rows_of(layout, rng)
                begin = time.perf_counter()
                prefetch_rows(memory, rows, prefetch=prefetch, products=products)
                spent = (time.perf_counter() - begin) / len(rows) * 1e9
                times.setdefault((layout, name), []).append(spent)
    found: list[dict[str, Any]] = [
        {"layout": layout, "case": name, "ns_a_row": statistics.median(mine)}
        for (layout, name), mine in times.items()
    ]
    write_rows(options.out, found)
    for row in found:
        print(f"{row['layout']:8}{row['case']:12}{row['ns_a_row']:8.1f} ns a row")
    print(options.out)


if __name__ == "__main__":
    main()
