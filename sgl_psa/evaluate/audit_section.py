"""The part of the report that shows ``audit.json``: requested against achieved coverage."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sgl_psa.evaluate import plots
from sgl_psa.evaluate.page import plot_grid, table


def audit_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plots and a table; empty if no row asked for a coverage.

    Args:
        rows: see :func:`sgl_psa.audit.report.row`. Those without ``requested`` are left out.
    """
    asked = [row for row in rows if row.get("requested") is not None]
    if not asked:
        return ""
    panels = {
        f"scorer {scorer}": [
            (f"{row['mode']}, {name}", row["requested"], row[column])
            for row in asked
            if row["scorer"] == scorer
            for column, name in (("achieved_mean", "mean"), ("achieved_p05", "5th percentile"))
        ]
        for scorer in dict.fromkeys(row["scorer"] for row in asked)
    }
    head = ["scorer, mode", "requested", "achieved", "5th percentile", "violations", "rows"]
    lines = [
        [
            ("", html.escape(f"{row['scorer']}, {row['mode']}")),
            ("", f"{row['requested']:g}"),
            ("" if row["achieved_mean"] >= row["requested"] else "loss", _share(row, "mean")),
            ("", _share(row, "p05")),
            ("", f"{100 * row['violation_rate']:.1f} %"),
            ("", str(row["rows"])),
        ]
        for row in asked
    ]
    return (
        "<h2>Audit: coverage requested and achieved</h2>"
        '<p class="note">Measured by a dense shadow pass on its own queries and keys. '
        "A row is one query head of one layer at one decode step; a violation is a row below what "
        "was requested. Above the dashed line the promise is kept.</p>"
        + plot_grid(plots.coverage(panels))
        + table("Audit", head, lines)
    )


def _share(row: Mapping[str, Any], name: str) -> str:
    return f"{row[f'achieved_{name}']:.4f}"
