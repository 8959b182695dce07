"""Which layer holds how much of the device tier, step by step, from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_psa.memory import plot

#: Servers in the picture, if they have rows; else the first that do.
SHOWN = ("arena 25 %", "25 %, layer-even", "arena 10 %", "10 %, layer-even")
TRACE = "warm"


def residency(path: Path, rows: Sequence[dict[str, Any]]) -> Path | None:
    """Write a picture, one panel a server.

    Returns:
        ``path``, ``None`` if no row has a history.
    """
    known = [row for row in rows if (row["residency"] or {"history": {}})["history"].get("steps")]
    found = {row["system"]: row["residency"] for row in known if row["trace"] == TRACE}
    found = found or {row["system"]: row["residency"] for row in known}
    shown = [name for name in SHOWN if name in found] or list(found)[:4]
    if not shown:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.residency({name: found[name] for name in shown}, path)
    return path
