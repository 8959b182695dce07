"""Rows to JSON, a table and the roofline plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.panels import bandwidth_line, save_panels

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """One line an op and thread count: milliseconds a layer, and in brackets times faster than
    torch_native or, where that does another job, the fraction of the streaming bandwidth."""
    settings = sorted({(r["batch"], r["context"]) for r in rows})
    heads = [f"{context // 1024}k x {batch}" for batch, context in settings]
    lines = [f"| ms a layer | threads | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    cells = {(r["op"], r["threads"], (r["batch"], r["context"])): r for r in rows}
    for name, threads in dict.fromkeys((r["op"], r["threads"]) for r in rows):
        found = [cells.get((name, threads, setting)) for setting in settings]
        lines.append(f"| {name} | {threads} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["vs_torch_native"] is not None:
        return f"{row['ms_median']:.2f} ({row['vs_torch_native']:.1f}x)"
    if row["bandwidth_fraction"] is not None:
        return f"{row['ms_median']:.2f} ({row['bandwidth_fraction']:.0%})"
    return f"{row['ms_median']:.2f}"


def plot(rows: list[Row], path: Path) -> None:
    """Bytes that an op must read against the time it takes, and the machine's bandwidth as a line:
    the nearer to its line, the better the op reads."""
    panels, bounds = {}, {}
    names = [n for n in dict.fromkeys(r["op"] for r in rows) if n != "stream_read"]
    for threads in sorted({r["threads"] for r in rows}):
        mine = [r for r in rows if r["threads"] == threads]
        title = f"{threads} thread{'s' if threads > 1 else ''}"
        panels[title] = {
            name: [(r["bytes"], r["ms_median"]) for r in mine if r["op"] == name] for name in names
        }
        if speeds := sorted(r["gbps"] for r in mine if r["op"] == "stream_read"):
            speed = speeds[len(speeds) // 2] * 1e9
            bounds[title] = bandwidth_line(speed, [r["bytes"] for r in mine])
    save_panels(path, panels, "bytes that the op must read", "ms a layer", bounds)
