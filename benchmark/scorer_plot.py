"""The picture of ``benchmark/scorer_recall.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.common import RESULTS

_MARKERS = {"sketch": "s", "rotated": "o", "two": "D", "exact": "*"}


def plot(report: dict[str, Any]) -> Path:
    """Write ``results/scorer_recall.png``: one row a length. Left: missed mass beyond the
    oracle's at equal pages, by scorer bytes. Right: missed mass under the marginal rule, by all
    bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = report["lengths"]
    figure, grid = pyplot.subplots(len(lengths), 2, figsize=(11, 4.2 * len(lengths)), squeeze=False)
    at = report["pages_attended"].index(8)
    for (tokens, found), (left, right) in zip(lengths.items(), grid, strict=True):
        for label, row in found["scorers"].items():
            style = {"marker": _MARKERS.get(label.split()[0], "^"), "label": label}
            left.plot(
                [100 * row["bytes_share"]], [max(row["excess"][at], 1e-5)], linestyle="", **style
            )
            rule = row["marginal"]
            right.plot([100 * p["bytes_share"] for p in rule], [p["missed"] for p in rule], **style)
        left.set_title(f"{tokens} tokens, 8 pages attended besides the forced ones")
        left.set_xlabel("bytes the scorer reads, % of K and V in bf16")
        left.set_ylabel("attention mass missed beyond the oracle's")
        right.set_ylabel("attention mass missed")
        right.set_title(f"{tokens} tokens, marginal rule, delta 0.3, 0.1, 0.03")
        right.set_xlabel("all bytes read (pages and scorer), % of K and V")
        right.set_xscale("log")
        left.set_yscale("log")
        for axes in (left, right):
            axes.grid(True, which="both", alpha=0.3)
        right.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    path = RESULTS / "scorer_recall.png"
    figure.savefig(path, dpi=120)
    return path
