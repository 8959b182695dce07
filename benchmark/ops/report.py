"""Rows to JSON, a table and the roofline plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({r["threads"] for r in rows})
    figure, axes = pyplot.subplots(
        1, len(counts), figsize=(7 * len(counts), 6), squeeze=False, sharey=True
    )
    names = [n for n in dict.fromkeys(r["op"] for r in rows) if n != "stream_read"]
    for threads, ax in zip(counts, axes[0], strict=True):
        mine = [r for r in rows if r["threads"] == threads]
        for number, name in enumerate(names):
            points = sorted((r["bytes"], r["ms_median"]) for r in mine if r["op"] == name)
            if points:
                style = "o^sDvP*X"[number % 8]
                ax.plot(*zip(*points, strict=True), marker=style, lw=0.7, ms=5, label=name)
        _line(ax, mine)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("bytes that the op must read")
        ax.set_ylabel("ms a layer")
        ax.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
        ax.grid(True, which="both", alpha=0.25)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _line(ax: Any, rows: Sequence[Row]) -> None:
    speeds = sorted(r["gbps"] for r in rows if r["op"] == "stream_read")
    if not speeds:
        return
    speed = speeds[len(speeds) // 2]
    ends = [min(r["bytes"] for r in rows), max(r["bytes"] for r in rows)]
    label = f"streaming bandwidth, {speed:.1f} GB/s"
    ax.plot(ends, [b / speed / 1e6 for b in ends], "k--", lw=1, label=label)
    ax.annotate(label, (ends[0], ends[0] / speed / 1e6), fontsize=8, va="top")
