"""What each part of the method is worth: one factor changed at a time, accuracy and bytes read.

    python -m benchmark.ablation --base psa:marginal:two_level:0.03

Every row runs the in-process evaluation of the embedded model on the same contexts and questions.
Fractions are means over tasks and relative to dense attention. Settings that count pages are kept
at the same number of tokens where the page size changes (at least a page each): forced pages,
groups, candidates, budget; delta stays the mass of one page. Where query heads select apart, all
that they read counts, scores and pages, against a dense pass that reads once for the group.
Summaries are all that is read besides K and V of attended pages, to score or to compensate.
``exact`` counts no bytes for its scores. The scorer decides the order of the pages and, through the
stop rule, their number; the rows of a fixed number of pages compare the order alone. A factor that
this version does not have is named below the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmark.common import RESULTS, save
from benchmark.policy_runs import DENSE_CASE, Case, PolicyRuns, changed, options, spec_of
from sgl_psa.config import ConfigError, PSAConfig, fields
from sgl_psa.evaluate import policy_spec
from sgl_psa.evaluate.paged_model import PAGE_SIZE
from sgl_psa.evaluate.tasks import PERPLEXITY, TASKS
from sgl_psa.policies import KNOBS
from sgl_psa.stop import STOP_RULES

PAGE_SIZES = (8, 16, 32, 64)
GROUPS = (1, 4, 16)
CANDIDATES = (16, 32, 64, 128)
BITS = (1, 2, 4)
SCORERS = ("exact", "sketch", "rotated_sketch", "two_level", "hybrid", "box")
#: Pages attended where only the order of the pages is compared, forced ones included.
BUDGET = 32
#: Parts that can be switched: the factor's name -> its field.
SWITCHES = {"tail compensation": "compensate", "budget prediction": "predict"}
PRIOR = "budget_prior"
_COUNT_PAGES = ("sink_pages", "recent_pages", "group_pages", "candidate_pages", "budget_pages")


class Entry(NamedTuple):
    """A row of the table."""

    factor: str
    value: str
    case: Case


class Missing(NamedTuple):
    """A row that cannot be had, and why."""

    factor: str
    value: str
    reason: str


def table(base: PSAConfig, prior: str = "") -> list[Entry | Missing]:
    """Every row: dense, the base, then one factor changed at a time.

    Args:
        prior: file for the setting ``budget_prior``; empty: no row with it.
    """
    rows: list[Entry | Missing] = [
        Entry("dense", "", DENSE_CASE),
        Entry("base", "", Case(spec_of(base))),
    ]
    for factor, value, settings in _settings(base):
        try:
            rows.append(Entry(factor, value, Case(spec_of(changed(base, **settings)))))
        except ConfigError as error:
            rows.append(Missing(factor, value, str(error)))
    known = {field.name for field in fields()}
    for factor, name in SWITCHES.items():
        if name not in known:
            rows.append(Missing(factor, "", f"no setting {name!r} in this version"))
    if prior and PRIOR in known:
        spec = spec_of(changed(base, predict=True, **{PRIOR: prior}))
        rows.append(Entry("budget prediction", "on, from a prior", Case(spec)))
    elif PRIOR in known:
        rows.append(Missing("budget prediction", "on, from a prior", "--prior was not given"))
    for size in PAGE_SIZES:
        spec = spec_of(changed(base, **same_tokens(base, size)))
        rows.append(Entry("page size", str(size), Case(spec, page_size=size)))
    for share, value in ((True, "shared by the group"), (False, "each for itself")):
        rows.append(Entry("query heads select", value, Case(spec_of(base), share_heads=share)))
    return rows


def _settings(base: PSAConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(factor, value, settings that differ from the base) of rows in the base's model."""
    for scorer in SCORERS:
        yield "scorer", scorer, {"scorer": scorer}
    budget = {"policy": "topk", "budget_pages": BUDGET}
    for scorer in SCORERS:
        yield f"best {BUDGET} pages by", scorer, {**budget, "scorer": scorer}
    yield f"best {BUDGET} pages by", "recency", {**budget, "policy": "window"}
    for scorer in ("sketch", "rotated_sketch", "two_level"):
        for bits in BITS:
            yield "bits", f"{scorer} {bits}", {"scorer": scorer, "sketch_bits": bits}
    for stop in STOP_RULES:
        knob = dict[str, str](KNOBS).get(stop)
        label = stop if knob is None else f"{stop}, {knob} {getattr(base, knob):g}"
        plain = {"stop": stop, "conservative": False}
        yield "stop rule", label, plain
        if stop == "coverage":
            yield "stop rule", f"{label}, conservative", {**plain, "conservative": True}
    for field in fields():
        for factor, name in SWITCHES.items():
            if field.name == name:
                values = field.choices or ((False, True) if field.kind is bool else ())
                for value in values or (field.default,):
                    shown = {True: "on", False: "off"}.get(value, value)
                    yield factor, str(shown), {name: value}
    for count in GROUPS:
        yield "pages in a group", str(count), {"group_pages": count}
    for count in CANDIDATES:
        yield "candidate pages", str(count), {"candidate_pages": count}


def same_tokens(base: PSAConfig, page_size: int) -> dict[str, int]:
    """The settings that count pages of 16 tokens, in pages of ``page_size``; none becomes 0."""
    old = {name: getattr(base, name) for name in _COUNT_PAGES}
    return {k: -(-n * PAGE_SIZE // page_size) for k, n in old.items()}


def markdown(rows: list[dict[str, Any]], missing: list[Missing], tasks: list[str]) -> str:
    """The rows as a table, and what is missing below it."""
    head = ["factor", "value", "bytes", "of it summaries", "pages", "rounds", *tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shares = [row["bytes_fraction"], row["scored_fraction"], row["pages_fraction"]]
        cells = [row["factor"], row["value"] + (" (base)" if row["is_base"] else "")]
        cells += [f"{share:.3f}" for share in shares] + [f"{row['rounds']:.2f}"]
        digits = {task: 1 if TASKS[task].metric == PERPLEXITY else 2 for task in tasks}
        cells += [f"{row['scores'][task]:.{digits[task]}f}" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    if missing:
        lines += ["", "Not available:", ""]
        lines += [f"* {m.factor} {m.value}".rstrip() + f": {m.reason}" for m in missing]
    return "\n".join(lines) + "\n"


def plot(name: str, rows: list[dict[str, Any]]) -> Path:
    """Bytes by what they were read for, and losses against dense, a bar a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{row['factor']} {row['value']}".strip() for row in rows]
    scored = [100 * row["scored_fraction"] for row in rows]
    attended = [100 * row["bytes_fraction"] - s for row, s in zip(rows, scored, strict=True)]
    figure, panels = pyplot.subplots(
        1, 3, figsize=(13, 1.2 + 0.24 * len(rows)), sharey=True, squeeze=False
    )
    left, middle, right = panels[0]
    left.barh(labels, attended, label="attended pages")
    left.barh(labels, scored, left=attended, label="summaries")
    left.set_xlabel("bytes read, % of dense")
    left.set_xlim(right=1.1 * max(a + s for a, s in zip(attended[1:], scored[1:], strict=True)))
    left.legend(fontsize=8)
    left.invert_yaxis()
    middle.barh(labels, [100 * _accuracy_loss(row) for row in rows], color="tab:red")
    middle.set_xlabel("accuracy lost to dense, points")
    right.barh(labels, [100 * _perplexity_growth(row) for row in rows], color="tab:purple")
    right.set_xlabel("perplexity above dense, %")
    for axes in (left, middle, right):
        axes.grid(True, axis="x", alpha=0.3)
        axes.margins(y=0.01)
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    return path


def _accuracy_loss(row: Mapping[str, Any]) -> float:
    pairs = [
        (row["dense_scores"][task], score)
        for task, score in row["scores"].items()
        if TASKS[task].metric != PERPLEXITY
    ]
    return sum(dense - score for dense, score in pairs) / max(1, len(pairs))


def _perplexity_growth(row: Mapping[str, Any]) -> float:
    pairs = [
        (row["dense_scores"][task], score)
        for task, score in row["scores"].items()
        if TASKS[task].metric == PERPLEXITY
    ]
    return sum(score / dense - 1 for dense, score in pairs) / max(1, len(pairs))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options((__doc__ or "").splitlines()[0], "ablation")
    parser.add_argument("--base", default="psa:marginal:two_level:0.03", help="a policy spec")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument(
        "--prior", default="", help="file of python -m sgl_psa.calibrate, for budget prediction"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    asked = parse(arguments)
    base = policy_spec.parse(asked.base).config
    lines = table(base, asked.prior)
    entries = [line for line in lines if isinstance(line, Entry)]
    missing = [line for line in lines if isinstance(line, Missing)]
    runs = PolicyRuns(asked)
    runs.measure([entry.case for entry in entries], asked.length)
    rows = [
        {
            "factor": entry.factor,
            "value": entry.value,
            "is_base": entry.case == Case(spec_of(base)),
            **runs.summary(entry.case, asked.length),
        }
        for entry in entries
    ]
    report = {
        "what": "fractions are means over tasks, relative to dense attention",
        "base": asked.base,
        "length": asked.length,
        "queries": asked.queries,
        "seed": asked.seed,
        "tasks": runs.tasks,
        "missing": [m._asdict() for m in missing],
        "rows": rows,
    }
    print(save(asked.name, report))
    text = markdown(rows, missing, runs.tasks)
    (RESULTS / f"{asked.name}.md").write_text(text)
    print(plot(asked.name, rows))
    print(text)


if __name__ == "__main__":
    main()
