"""``report.html``: one file with tables and plots, made from the rows alone."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from sgl_psa.evaluate import plots
from sgl_psa.evaluate.audit_section import audit_section
from sgl_psa.evaluate.interval import paired_difference
from sgl_psa.evaluate.page import page, plot_grid, table, text
from sgl_psa.evaluate.results import COLUMNS, Row
from sgl_psa.evaluate.tasks import TASKS

#: A score counts as dense within one point of accuracy, or one per cent of perplexity.
POINT = 0.01
_HEAD_POLICIES = ("psa",)
_MOST_HEAT_MAPS = 6


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``report.html`` beside the rows; returns its path.

    Args:
        rows: of ``eval.json``; if ``audit.json`` lies in ``folder`` its coverage is shown too.
    """
    sections = []
    for model, runner, style in dict.fromkeys((r["model"], r["runner"], r["style"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["runner"], r["style"]) == (model, runner, style)]
        sections.append(_section(model, runner, style, mine))
    audit = folder / "audit.json"
    if audit.exists():
        sections.append(audit_section(json.loads(audit.read_text())))
    sections.append(_RERUN)
    made = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    made.write_text(page("sgl-psa: accuracy against bytes read", sections))
    return made


def within(row: Row) -> bool:
    """Whether a row's score is as good as dense: see ``POINT``."""
    if row["metric"] == "perplexity":
        return row["score"] <= row["dense_score"] * (1 + POINT)
    return row["score"] >= row["dense_score"] - POINT - 1e-9


def _section(model: str, runner: str, style: str, rows: Sequence[Row]) -> str:
    lengths = sorted({row["length"] for row in rows})
    read = [row for row in rows if row["bytes_fraction"] is not None]
    parts = [
        f"<h2>Model: {html.escape(model)}</h2>",
        f'<p class="note">Runner: {runner}; prompts: {style}; seeds: '
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}. "
        "Bytes are those of the decode steps, summaries and sketches included, over what dense "
        "attention reads.</p>",
        *(_least_bytes(read, length) for length in lengths),
    ]
    if read:
        parts += [
            "<h2>Score against bytes read</h2>",
            plot_grid(plots.score_against_bytes(read)),
        ]
    if len(lengths) > 1:
        parts += [
            "<h2>Bytes against context length</h2>",
            plot_grid(plots.bytes_against_length(read)),
        ]
    with_heads = [r for r in rows if r["policy"] in _HEAD_POLICIES and "pages_by_head" in r]
    shown = list(dict.fromkeys(row["spec"] for row in with_heads))[:_MOST_HEAT_MAPS]
    with_heads = [row for row in with_heads if row["spec"] in shown]
    if with_heads:
        parts += [
            "<h2>Budget by layer and KV head</h2>",
            '<p class="note">Share of the pages that are attended, mean over tasks.</p>',
            plot_grid(plots.budget_by_head(with_heads)),
            "<h2>Rounds by layer and KV head</h2>",
            '<p class="note">Groups of pages attended one after the other in a decode step.</p>',
            plot_grid(plots.rounds_by_head(with_heads)),
        ]
    points = [
        (row["curve"], row["knob"], row["coverage"])
        for row in rows
        if row["knob_name"] == "coverage" and row["coverage"] is not None
    ]
    if points:
        parts += [
            "<h2>Coverage requested and estimated</h2>",
            '<p class="note">As the stop rule itself estimates it; the audit measures it.</p>',
            plot_grid(plots.coverage({"estimated, mean over tasks": points})),
        ]
    return "\n".join([*parts, "<h2>All rows</h2>", _all_rows(rows)])


def _least_bytes(rows: Sequence[Row], length: int) -> str:
    """A line for each curve: its least bytes that keep every task's score."""
    here = [row for row in rows if row["length"] == length]
    if not here:
        return ""
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
    measured = {(row["curve"], row["task"]) for row in here}
    kept = [row for row in cells.values() if row and not row["policy"].startswith("oracle")]
    best = {
        task: min((row["bytes_fraction"] for row in kept if row["task"] == task), default=None)
        for task in tasks
    }
    dense = {row["task"]: row["dense_score"] for row in here}
    lines = []
    for curve in curves:
        line = [("", html.escape(curve))]
        for task in tasks:
            row = cells[curve, task]
            if row is None:
                line.append(("loss", "no knob") if (curve, task) in measured else ("", "-"))
                continue
            knob = "" if row["knob"] is None else f" <small>at {row['knob']:g}</small>"
            mark = "best" if row["bytes_fraction"] == best[task] else ""
            line.append((mark, f"{row['bytes_fraction']:.3g}{knob}"))
        lines.append(line)
    head = ["policy", *(f"{task}<br><small>dense {dense[task]:.4g}</small>" for task in tasks)]
    return (
        f"<h2>Least bytes within one point of dense, {length} tokens</h2>"
        '<p class="note">Bytes read over dense; the least of a task is marked. Perplexity: within '
        "one per cent. Small print: the knob. &ldquo;no knob&rdquo;: none of those measured keeps "
        "the score. With few questions one point is less than chance: see the intervals below.</p>"
        + table(f"Least bytes, {length} tokens", head, lines)
    )


def _all_rows(rows: Sequence[Row]) -> str:
    """Every column of every row, and the difference to dense."""
    lines = []
    for row in rows:
        values = {name: html.escape(text(row[name])) for name in COLUMNS}
        line = [("", html.escape(row["spec"]))]
        for name in COLUMNS[4:]:
            bad = name == "score" and not within(row)
            line.append(("loss" if bad else "", values[name]))
        line.insert(-2, ("", _difference(row, rows)))
        lines.append(line)
    head = ["policy", *(name.replace("_", " ") for name in COLUMNS[4:])]
    head.insert(-2, "to dense, points<br><small>95 % interval</small>")
    return (
        '<p class="note">To dense: difference in points on the same questions, with the interval '
        "of Bonett and Price, which takes questions as independent; several share a context.</p>"
        + table("All rows", head, lines, scroll=True)
    )


def _difference(row: Row, rows: Sequence[Row]) -> str:
    """The difference to dense on the same questions, if the grades of both are known."""
    same = ("task", "length", "seed", "asked", "fingerprint")
    dense = next(
        (r for r in rows if r["policy"] == "dense" and all(r[k] == row[k] for k in same)), None
    )
    grades = [] if dense is None or row is dense else dense.get("grades", [])
    if not grades or len(row.get("grades", [])) != len(grades):
        return "-"
    points = [100 * share for share in paired_difference(row["grades"], grades)]
    return f"{points[0]:+.1f} <small>{points[1]:+.1f} to {points[2]:+.1f}</small>"


_RERUN = """<h2>Run it again</h2>
<pre>make eval                     # the embedded model; what is in out/eval.json is kept
make eval QUICK=1             # a smaller run
make audit                    # requested against achieved coverage, shown by the next make eval
python -m sgl_psa.evaluate --model FOLDER --lengths 4096,16384 --policies psa:marginal:0.1,topk:64
python -m sgl_psa.evaluate --server http://127.0.0.1:30000</pre>"""
