"""Pictures of what was measured on a GPU.

    python -m benchmark.gpu.plot out/gpu_decode_op.json out/gpu_serving.json

Operators as a roofline, bytes that must be read against the time they take; servers by context.
Each picture lies beside its file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmark.panels import bandwidth_line, save_panels

Series = dict[str, list[tuple[float, float]]]


def roofline(report: dict[str, Any], path: Path) -> Path:
    """Of the report of ``benchmark.gpu.decode_op``, a panel a page size; returns the path."""
    panels: dict[str, Series] = {}
    bounds = {}
    for row in report["results"]:
        series = panels.setdefault(f"pages of {row['page_size']} tokens", {})
        for name, found in row["variants"].items():
            series.setdefault(name, []).append((found["bytes"], found["ms"]["median"]))
    for title, series in panels.items():
        amounts = [amount for points in series.values() for amount, _ in points]
        bounds[title] = bandwidth_line(report["copy_bytes_per_second"], amounts)
    return save_panels(path, panels, "bytes that must be read", "ms a layer", bounds)


def steps(report: dict[str, Any], path: Path) -> Path:
    """Of the report of ``benchmark.gpu.serving``, a panel a batch; returns the path."""
    panels: dict[str, Series] = {}
    for name, rows in report["results"].items():
        for row in rows:
            points = panels.setdefault(f"{row['batch']} at once", {}).setdefault(name, [])
            points.append((row["length"], row["step_ms"]["median"]))
    return save_panels(path, panels, "tokens of context", "ms a step")


def picture(report: dict[str, Any], path: Path) -> str:
    """Where the picture of a report lies that was written to ``path``, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no picture without matplotlib; elsewhere: python -m benchmark.gpu.plot {path}"
    draw = roofline if "copy_bytes_per_second" in report else steps
    return str(draw(report, path.with_suffix(".png")))


def main(arguments: list[str]) -> None:
    for name in map(Path, arguments):
        print(picture(json.loads(name.read_text()), name))


if __name__ == "__main__":
    main(sys.argv[1:])
