"""A step of decoding by context, a panel a model, batch and number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.panels import save_panels


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write the picture of the rows of ``bench_serving.json``; returns its path."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(rows, key=lambda r: (r["model"], r["threads"], r["batch"])):
        threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
        title = f"{row['model']}, {row['batch']} at once{threads}"
        points = panels.setdefault(title, {}).setdefault(row["system"], [])
        points.append((row["context"], row["decode_ms_median"]))
    return save_panels(path, panels, "tokens of context", "ms a step")
