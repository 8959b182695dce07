"""Rows of ``audit.json``, the printed table and the calibration plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_psa.audit.counts import TOLERANCE
from sgl_psa.audit.replay import Measured
from sgl_psa.audit.settings import Setting


def row(setting: Setting, by_length: Mapping[int, Measured]) -> dict[str, Any]:
    """One row of ``audit.json``: a setting over all lengths.

    ``requested`` and ``violation_rate`` are ``None`` under the marginal rule, which asks for no
    coverage; its knob is ``delta``.
    """
    coverage = torch.cat([x for m in by_length.values() for x in m.coverage]).double()
    claimed = torch.cat([x for m in by_length.values() for x in m.claimed]).double()
    error = torch.cat([x for m in by_length.values() for x in m.error]).double()
    asked = setting.config.stop == "coverage"

    def violations(achieved: torch.Tensor) -> float | None:
        if not asked:
            return None
        return float((achieved < setting.knob - TOLERANCE).double().mean())

    return {
        "stop": setting.config.stop,
        "mode": setting.mode,
        "scorer": setting.config.scorer,
        "requested": setting.knob if asked else None,
        "delta": None if asked else setting.knob,
        "achieved_mean": float(coverage.mean()),
        "achieved_p05": float(torch.quantile(coverage, 0.05)),
        "violation_rate": violations(coverage),
        "rows": len(coverage),
        "claimed_mean": float(claimed.mean()),
        "error_mean": float(error.mean()),
        "pages_fraction": sum(m.pages for m in by_length.values())
        / sum(m.pages_total for m in by_length.values()),
        "violation_rate_by_length": {
            str(length): violations(torch.cat(m.coverage)) for length, m in by_length.items()
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    head = ("scorer", "stop", "mode", "knob", "achieved", "p05", "violations", "pages", "error")
    lines = [head]
    for r in rows:
        knob = r["delta"] if r["requested"] is None else r["requested"]
        rate = "-" if r["violation_rate"] is None else f"{100 * r['violation_rate']:.1f} %"
        lines.append(
            (
                r["scorer"],
                r["stop"],
                r["mode"],
                f"{knob:g}",
                f"{r['achieved_mean']:.3f}",
                f"{r['achieved_p05']:.3f}",
                rate,
                f"{100 * r['pages_fraction']:.1f} %",
                f"{r['error_mean']:.3f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Attention mass left unread against what was asked for: one panel a scorer, two lines a mode.

    Both axes are 1 - coverage, logarithmic; below the diagonal the promise is kept.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = [r for r in rows if r["requested"] is not None]
    scorers = list(dict.fromkeys(r["scorer"] for r in asked))
    figure, panels = pyplot.subplots(
        1, len(scorers), figsize=(5 * len(scorers), 4.2), sharey=True, squeeze=False
    )
    for scorer, axes in zip(scorers, panels[0], strict=True):
        mine = [r for r in asked if r["scorer"] == scorer]
        for i, mode in enumerate(dict.fromkeys(r["mode"] for r in mine)):
            points = sorted((r for r in mine if r["mode"] == mode), key=lambda r: r["requested"])
            x = [1 - r["requested"] for r in points]
            lines = (("achieved_mean", "o-", "mean"), ("achieved_p05", "v--", "worst 5 %"))
            for key, style, name in lines:
                y = [1 - r[key] for r in points]
                axes.plot(x, y, style, color=f"C{i}", alpha=0.8, label=f"{mode}, {name}")
        axes.plot([0.01, 0.1], [0.01, 0.1], color="black", linewidth=1, label="requested")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"scorer {scorer}")
        axes.set_xlabel("1 - requested coverage")
        axes.grid(True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("1 - achieved coverage")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
