"""One op under measurement, and its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmark.ops.setting import Setting, torch_isa

#: Backends that are torch's kernels, not ours.
_OF_TORCH = ("torch_native", "torch")


@dataclass
class Op:
    """A step of one layer.

    Attributes:
        call: with the index of a layer.
        bytes: that it must read in one layer.
        counted: which bytes these are.
        pages_fraction: share of pages attended, ``None`` for what does not attend.
        whole: whether it is all of a layer's decode attention, so that torch's can be compared.
    """

    name: str
    backend: str
    call: Callable[[int], object]
    bytes: float
    counted: str
    pages_fraction: float | None = None
    whole: bool = False


def row(op: Op, s: Setting, threads: int, ms: float, cpu_ms: float, rounds: int) -> dict[str, Any]:
    """What the JSON says of ``op``; the columns that compare it with others come later."""
    gbps = op.bytes / ms / 1e6
    return {
        "op": op.name,
        "backend": op.backend,
        "isa": torch_isa() if op.backend in _OF_TORCH else s.isa,
        "context": s.context,
        "batch": s.batch,
        "threads": threads,
        "in_order": s.in_order,
        "ms_median": ms,
        "gbps": gbps,
        "bandwidth_fraction": None,
        "pages_fraction": op.pages_fraction,
        "vs_torch_native": None,
        "cpu_ms_median": cpu_ms,
        "bytes": int(op.bytes),
        "bytes_counted": op.counted,
        "rounds": rounds,
    }


def compare(rows: list[dict[str, Any]], ops: list[Op]) -> None:
    """Fill in ``bandwidth_fraction`` and ``vs_torch_native`` of rows of one setting, in place."""
    by_name = {entry["op"]: entry for entry in rows}
    stream, peer = by_name.get("stream_read"), by_name.get("torch_native")
    for entry, op in zip(rows, ops, strict=True):
        if stream is not None:
            entry["bandwidth_fraction"] = entry["gbps"] / stream["gbps"]
        if peer is not None and op.whole:
            entry["vs_torch_native"] = peer["ms_median"] / entry["ms_median"]
