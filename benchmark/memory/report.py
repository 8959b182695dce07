"""The rows as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def _number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row[key]
        return "" if value is None else f"{value * scale:.{digits}f}"

    return show


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("requests/s", _number("request_throughput", 3)),
    ("decode tok/s", _number("decode_tok_s", 1)),
    ("TTFT p50, s", _number("ttft_p50", 2)),
    ("p99", _number("ttft_p99", 2)),
    ("held, most", _number("running_max", 0)),
    ("retractions", _number("retractions", 0)),
    ("loaded, MB", _number("bytes_loaded", 1, 1e-6)),
    ("in vain, MB", _number("bytes_in_vain", 1, 1e-6)),
    ("hits", _number("hit_rate", 4)),
    ("device, MB", _number("device_bytes", 1, 1e-6)),
    ("equal", lambda row: "yes" if row["outputs_equal_resident"] else "NO"),
)


def markdown(rows: Sequence[Row]) -> str:
    """One table a trace, one line a server."""
    parts = []
    for trace in dict.fromkeys(row["trace"] for row in rows):
        mine = [row for row in rows if row["trace"] == trace]
        clients, rounds = mine[0]["concurrency"], mine[0]["rounds"]
        title = f"{trace}: {mine[0]['requests']} requests, {clients} clients, {rounds} round(s)"
        heads = " | ".join(name for name, _ in COLUMNS)
        lines = [f"**{title}**", "", f"| server | {heads} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for row in mine:
            cells = " | ".join(show(row) for _, show in COLUMNS)
            lines.append(f"| {row['system']} | {cells} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
