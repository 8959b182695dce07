"""``report.html``: one file with tables and plots, made from the rows alone."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_psa.evaluate import plots
from sgl_psa.evaluate.results import COLUMNS, Row
from sgl_psa.evaluate.tasks import TASKS

#: A score counts as dense within one point of accuracy, or one per cent of perplexity.
POINT = 0.01
_HEAD_POLICIES = ("psa",)
_MOST_HEAT_MAPS = 6
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
  color: #1c2430; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #dde2e9; text-align: right; }
th { background: #f3f5f8; position: sticky; top: 0; }
td:first-child, th:first-child { text-align: left; }
td.best { background: #e3f4e4; font-weight: 600; }
td.loss { color: #a33; }
svg { max-width: 100%; height: auto; }
pre { background: #f3f5f8; padding: .7rem; overflow-x: auto; }
.scroll { overflow: auto; max-height: 36rem; }
p.note { color: #556; }
"""


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``report.html`` beside the rows; returns its path.

    Args:
        rows: of ``eval.json``; if ``audit.json`` lies in ``folder`` its coverage is plotted too.
    """
    sections = []
    for model, runner, style in dict.fromkeys((r["model"], r["runner"], r["style"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["runner"], r["style"]) == (model, runner, style)]
        sections.append(_section(model, runner, style, mine))
    audit = folder / "audit.json"
    if audit.exists():
        sections.append(_audit(json.loads(audit.read_text())))
    sections.append(_rerun())
    page = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>sgl-psa evaluation</title><style>{_STYLE}</style></head><body>\n"
        "<h1>sgl-psa: accuracy against bytes read</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    return page


def within(row: Row) -> bool:
    """Whether a row's score is as good as dense: see ``POINT``."""
    if row["metric"] == "perplexity":
        return row["score"] <= row["dense_score"] * (1 + POINT)
    return row["score"] >= row["dense_score"] - POINT - 1e-9


def _section(model: str, runner: str, style: str, rows: Sequence[Row]) -> str:
    lengths = sorted({row["length"] for row in rows})
    parts = [
        f"<h2>Model: {html.escape(model)}</h2>",
        f'<p class="note">Runner: {runner}; prompts: {style}; seeds: '
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}. "
        "Bytes are those of the decode steps, summaries and sketches included, over what dense "
        "attention reads.</p>",
        *(_least_bytes(rows, length) for length in lengths),
        "<h2>Score against bytes read</h2>",
        plots.score_against_bytes([row for row in rows if row["bytes_fraction"] is not None]),
    ]
    if len(lengths) > 1:
        parts += ["<h2>Bytes against context length</h2>", plots.bytes_against_length(rows)]
    with_heads = [r for r in rows if r["policy"] in _HEAD_POLICIES and "pages_by_head" in r]
    shown = list(dict.fromkeys(row["spec"] for row in with_heads))[:_MOST_HEAT_MAPS]
    with_heads = [row for row in with_heads if row["spec"] in shown]
    if with_heads:
        parts += [
            "<h2>Budget by layer and KV head</h2>",
            plots.budget_by_head(with_heads),
            "<h2>Rounds by layer and KV head</h2>",
            plots.rounds_by_head(with_heads),
        ]
    points = [
        (row["curve"], row["knob"], row["coverage"])
        for row in rows
        if row["knob_name"] == "coverage" and row["coverage"] is not None
    ]
    if points:
        parts += [
            "<h2>Coverage asked for and estimated</h2>",
            '<p class="note">As the stop rule itself estimates it; the audit measures it.</p>',
            plots.coverage(points),
        ]
    parts += ["<h2>All rows</h2>", _all_rows(rows)]
    return "\n".join(parts)


def _least_bytes(rows: Sequence[Row], length: int) -> str:
    """A line for each curve: its least bytes that keep every task's score."""
    here = [row for row in rows if row["length"] == length and row["bytes_fraction"] is not None]
    tasks = [task for task in TASKS if any(row["task"] == task for row in here)]
    curves = list(dict.fromkeys(row["curve"] for row in here))
    cells = {
        (curve, task): min(
            (r for r in here if (r["curve"], r["task"]) == (curve, task) and within(r)),
            key=lambda row: row["bytes_fraction"],
            default=None,
        )
        for curve in curves
        for task in tasks
    }
    best = {
        task: min((r["bytes_fraction"] for c in curves if (r := cells[c, task])), default=None)
        for task in tasks
    }
    dense = {row["task"]: row["dense_score"] for row in here}
    head = ["policy", *(f"{task}<br>dense {dense[task]:.4g}" for task in tasks)]
    lines = []
    for curve in curves:
        line = [f"<td>{html.escape(curve)}</td>"]
        for task in tasks:
            row = cells[curve, task]
            if row is None:
                line.append('<td class="loss">no knob</td>')
                continue
            knob = "" if row["knob"] is None else f" <small>at {row['knob']:g}</small>"
            mark = ' class="best"' if row["bytes_fraction"] == best[task] else ""
            line.append(f"<td{mark}>{row['bytes_fraction']:.4f}{knob}</td>")
        lines.append("<tr>" + "".join(line) + "</tr>")
    return (
        f"<h2>Least bytes within one point of dense, {length} tokens</h2>"
        '<p class="note">Perplexity: within one per cent. Small print: the knob. '
        "&ldquo;no knob&rdquo;: none of those measured keeps the score.</p>"
        "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>\n"
        "" + "\n".join(lines) + "</table>"
    )


def _all_rows(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{' class=loss' if name == 'score' and not within(row) else ''}>"
            f"{html.escape(_text(row[name]))}</td>"
            for name in COLUMNS
        )
        lines.append(f'<tr title="{html.escape(row["spec"])}">{cells}</tr>')
    table = f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
    return f'<div class="scroll">{table}</div>'


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _audit(rows: Sequence[Row]) -> str:
    points = [
        (f"{r['stop']} {r['mode']}", r["requested"], r["achieved_mean"])
        for r in rows
        if isinstance(r.get("requested"), float) and r.get("achieved_mean") is not None
    ]
    if not points:
        return ""
    return "<h2>Audit: coverage asked for and measured</h2>" + plots.coverage(points)


def _rerun() -> str:
    return """<h2>Run it again</h2>
<pre>make eval                     # the embedded model; what is in out/eval.json is kept
make eval QUICK=1             # a smaller run
python -m sgl_psa.evaluate --model FOLDER --lengths 4096,16384 --policies psa:marginal:0.1,topk:64
python -m sgl_psa.evaluate --server http://127.0.0.1:30000</pre>"""
