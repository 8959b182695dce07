"""Bytes read against context length: the scorer's share, the attended pages' share, and accuracy.

    python -m benchmark.length_curve --lengths 2048,4096,8192,16000

Two parts. The embedded model answers the evaluation's questions at every length under every policy
(its positions end at 16384, so 16000 leaves room for question and answer). The bytes of scoring
alone need no model: every scorer scores a made-up cache of one KV head up to ``--scored-lengths``,
and what it says that it read is taken; one-level scorers read every page, ``two_level`` one bit of
every page and more of at most ``candidate_pages``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmark.common import RESULTS, plot_lines, save
from benchmark.policy_runs import DENSE_CASE, Case, PolicyRuns, options, spec_of
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.evaluate import policy_spec
from sgl_psa.evaluate.paged_model import PAGE_SIZE
from sgl_psa.evaluate.tasks import PERPLEXITY, TASKS
from sgl_psa.scorers import CacheShape, make_scorer
from sgl_psa.scorers.base import PageBatch

POLICIES = (
    "psa:marginal:two_level:0.03",
    "psa:marginal:two_level:0.1",
    "psa:marginal:sketch:0.1",
    "psa:marginal:rotated_sketch:0.1",
    "topk:box:64",
    "topk:box:128",
    "topk:box:256",
)
#: label -> settings of scorers whose bytes are compared.
SCORERS: dict[str, dict[str, Any]] = {
    **{f"sketch, {b} bit": {"scorer": "sketch", "sketch_bits": b} for b in (2, 4)},
    **{f"rotated, {b} bit": {"scorer": "rotated_sketch", "sketch_bits": b} for b in (1, 2)},
    **{f"two levels, 1 + {b} bit": {"scorer": "two_level", "sketch_bits": b} for b in (2, 4)},
}


def scored_bytes(config: PSAConfig, length: int, head_dim: int) -> float:
    """Bytes that the scorer of ``config`` reads for one query, one KV head, ``length`` tokens."""
    pages = -(-length // PAGE_SIZE)
    backend = resolve_backend("auto", "cpu")
    shape = CacheShape(1, pages, PAGE_SIZE, 1, head_dim, torch.device("cpu"))
    scorer = make_scorer(config, shape, backend)
    rng = torch.Generator().manual_seed(length)
    k = torch.randn(pages * PAGE_SIZE, 1, head_dim, generator=rng).bfloat16()
    scorer.on_write(0, torch.arange(length), k)
    batch = PageBatch(
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.ones(1, dtype=torch.uint8),
    )
    q = torch.randn(1, 1, head_dim, generator=rng).bfloat16()
    scorer.score(0, q, batch, head_dim**-0.5)
    read = scorer.read_bytes(0)
    return float(pages * scorer.bytes_per_page if read is None else read.sum())


def scoring(lengths: list[int], head_dim: int) -> dict[str, list[tuple[float, float]]]:
    """(length, bytes) of every scorer, and of dense attention over K and V in 16 bits."""
    curves = {
        label: [(float(n), scored_bytes(PSAConfig(**settings), n, head_dim)) for n in lengths]
        for label, settings in SCORERS.items()
    }
    curves["K and V, 16 bits"] = [(float(n), 4.0 * n * head_dim) for n in lengths]
    return curves


def measured(runs: PolicyRuns, cases: dict[str, Case], lengths: list[int]) -> list[dict[str, Any]]:
    """One row a policy and length."""
    rows = []
    for length in lengths:
        runs.measure(cases.values(), length)
        for label, case in cases.items():
            found = runs.summary(case, length)
            share = found["scored_fraction"] / found["bytes_fraction"]
            rows.append(
                {
                    "policy": label,
                    "length": length,
                    **found,
                    "attended_fraction": round(
                        found["bytes_fraction"] - found["scored_fraction"], 6
                    ),
                    "head_bytes_scored": round(found["head_bytes"] * share, 1),
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """The rows as a table."""
    head = ["policy", "tokens", "bytes", "of it summaries", "kB a step, layer and KV head", *tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["policy"], str(row["length"])]
        cells += [f"{row[name]:.3f}" for name in ("bytes_fraction", "scored_fraction")]
        cells.append(f"{row['head_bytes'] / 1000:.1f}")
        digits = {task: 1 if TASKS[task].metric == PERPLEXITY else 2 for task in tasks}
        cells += [f"{row['scores'][task]:.{digits[task]}f}" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves(rows: list[dict[str, Any]], column: str) -> dict[str, list[tuple[float, float]]]:
    """(length, value of ``column``) by policy."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row["policy"], []).append((row["length"], row[column]))
    return found


def plot_shares(name: str, rows: list[dict[str, Any]]) -> Path:
    """Bytes against length as shares of dense: all, for attended pages, to score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "bytes_fraction": "all bytes read",
        "attended_fraction": "K and V of attended pages",
        "scored_fraction": "read to score",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), sharex=True)
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for label, points in curves(rows, column).items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("context (tokens)")
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel("share of the bytes of dense attention")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options((__doc__ or "").splitlines()[0], "length_curve")
    parser.add_argument("--lengths", default="2048,4096,8192,16000", help="tokens of a prompt")
    parser.add_argument("--policies", default=",".join(POLICIES), help="specs")
    parser.add_argument("--scored-lengths", default="2048,4096,8192,16384,32768,65536,131072")
    parser.add_argument("--head-dim", type=int, default=128, help="of the made-up caches")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    asked = parse(arguments)
    lengths = [int(n) for n in asked.lengths.split(",")]
    cases = {"dense": DENSE_CASE}
    cases |= {t: Case(spec_of(policy_spec.parse(t).config)) for t in asked.policies.split(",")}
    alone = scoring([int(n) for n in asked.scored_lengths.split(",")], asked.head_dim)
    runs = PolicyRuns(asked)
    rows = measured(runs, cases, lengths)
    report = {
        "what": "bytes are means over tasks, decode steps, layers and KV heads; fractions are "
        "relative to dense attention",
        "queries": asked.queries,
        "seed": asked.seed,
        "tasks": runs.tasks,
        "rows": rows,
        "scoring": {
            "what": "bytes read to score one query of one KV head, made-up keys",
            "head_dim": asked.head_dim,
            "page_size": PAGE_SIZE,
            "candidate_pages": PSAConfig().candidate_pages,
            "bytes": alone,
        },
    }
    print(save(asked.name, report))
    (RESULTS / f"{asked.name}.md").write_text(markdown(rows, runs.tasks))
    sparse = [row for row in rows if row["policy"] != "dense"]
    x = "context (tokens)"
    print(plot_shares(f"{asked.name}_fraction", sparse))
    y = "bytes read a decode step, layer and KV head"
    print(plot_lines(f"{asked.name}_bytes", curves(rows, "head_bytes"), x, y))
    y = "bytes read to score, a decode step and KV head"
    print(plot_lines(f"{asked.name}_scoring", alone, x, y))
    print(markdown(rows, runs.tasks))


if __name__ == "__main__":
    main()
