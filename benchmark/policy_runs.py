"""Policies on the embedded model, by the in-process evaluation; what is measured is kept."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sgl_psa.config import PSAConfig
from sgl_psa.evaluate import policy_spec
from sgl_psa.evaluate.cli import EMBEDDED
from sgl_psa.evaluate.in_process import InProcess, load_model
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.measurement import build_examples
from sgl_psa.evaluate.paged_model import PAGE_SIZE
from sgl_psa.evaluate.policy_spec import DENSE, PolicySpec
from sgl_psa.evaluate.results import Results, Row, make_row
from sgl_psa.evaluate.tasks import ACCURACY, TASKS
from sgl_psa.policies import KNOBS, POLICIES

#: Tasks with short answers, and text.
FAST_TASKS = "single,multi_key,all_needle,tracking,text"
_FRACTIONS = (
    "bytes_fraction",
    "scored_fraction",
    "pages_fraction",
    "head_bytes",
    "rounds",
    "coverage",
)


class Case(NamedTuple):
    """A policy, and the model that it runs in."""

    spec: PolicySpec
    page_size: int = PAGE_SIZE
    share_heads: bool = True


DENSE_CASE = Case(policy_spec.parse(DENSE))


def spec_of(config: PSAConfig) -> PolicySpec:
    """The spec that names every setting that is not the default: the same text, the same policy."""
    default = PSAConfig(policy=config.policy).as_dict()
    parts = [f"{k}={v}" for k, v in config.as_dict().items() if v != default[k]]
    knob = None if config.policy == DENSE else KNOBS[POLICIES[config.policy].limit or config.stop]
    text = ":".join([config.policy, *parts])
    return PolicySpec(text, config, None if knob is None else getattr(config, knob), knob)


def changed(config: PSAConfig, **settings: Any) -> PSAConfig:
    """``config`` with some settings replaced.

    Raises:
        ConfigError: they do not go together.
    """
    return dataclasses.replace(config, **settings)


def options(description: str, name: str) -> argparse.ArgumentParser:
    """What every benchmark over policies can be asked."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tasks", default=FAST_TASKS)
    made.add_argument("--queries", type=int, default=100, help="questions a task")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--batch", type=int, default=64, help="rows decoded together")
    made.add_argument("--name", default=name, help="of the files in benchmark/results")
    made.add_argument(
        "--rows",
        type=Path,
        default=Path("out/policy_runs.json"),
        help="what is measured already, and goes on there; remove it when the method changed",
    )
    return made


class PolicyRuns:
    """Measures cases that are not in the file yet; cases of one model share prefilled contexts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tasks: list[str] = arguments.tasks.split(",")
        self._arguments = arguments
        self._results = Results(arguments.rows)
        self._model, self._tokenizer = load_model(str(EMBEDDED), "auto", "cpu")
        self._material = Material(self._tokenizer, RECALL)
        self._runners: dict[tuple[int, bool], InProcess] = {}
        fingerprint = self._runner(DENSE_CASE).identity["fingerprint"]
        self._results.drop_outdated("embedded", fingerprint)

    def measure(self, cases: Iterable[Case], length: int) -> None:
        """Every case, and dense, on every task; rows are kept after each task."""
        models: dict[tuple[int, bool], list[Case]] = {}
        for case in dict.fromkeys([DENSE_CASE, *cases]):
            models.setdefault(case[1:], []).append(case)
        work = [
            (task, missing)
            for some in models.values()
            for task in self.tasks
            if (missing := [case for case in some if self._find(case, task, length) is None])
        ]
        count = self._arguments.queries
        with tqdm(total=sum(len(some) for _, some in work) * count, unit="query") as bar:
            for task, some in work:
                _, page_size, share_heads = some[0]
                heads = "" if share_heads else ", heads apart"
                bar.set_description(f"{length} {task}, pages of {page_size}{heads}")
                examples = build_examples(
                    TASKS[task], task, self._material, length, count, self._arguments.seed
                )
                runner = self._runner(some[0])
                measured = runner.measure(examples, [case.spec for case in some], bar.update)
                self._keep(task, length, some, measured)

    def row(self, case: Case, task: str, length: int) -> Row:
        """What ``measure`` found."""
        found = self._find(case, task, length)
        assert found is not None, (case.spec.text, task, length)
        return found

    def summary(self, case: Case, length: int) -> dict[str, Any]:
        """One case at one length: fractions as means over tasks, scores by task."""
        rows = {task: self.row(case, task, length) for task in self.tasks}
        accuracies = [r["score"] for r in rows.values() if r["metric"] == ACCURACY]
        return {
            **{name: _mean([row[name] for row in rows.values()]) for name in _FRACTIONS},
            "accuracy": _mean(accuracies),
            "scores": {task: row["score"] for task, row in rows.items()},
            "dense_scores": {task: row["dense_score"] for task, row in rows.items()},
            "spec": case.spec.text,
            "page_size": case.page_size,
            "share_heads": case.share_heads,
        }

    def _runner(self, case: Case) -> InProcess:
        key = case[1:]
        if key not in self._runners:
            self._runners[key] = InProcess(
                self._model,
                self._tokenizer,
                name="embedded",
                folder=EMBEDDED,
                chat=False,
                batch=self._arguments.batch,
                page_size=case.page_size,
                share_heads=case.share_heads,
            )
        return self._runners[key]

    def _identity(self, case: Case) -> Row:
        asked = {"seed": self._arguments.seed, "asked": self._arguments.queries}
        return {**self._runner(case).identity, "style": RECALL, **asked}

    def _find(self, case: Case, task: str, length: int) -> Row | None:
        key = {"task": task, "length": length, "spec": case.spec.text}
        return self._results.find({**self._identity(case), **key})

    def _keep(self, task: str, length: int, cases: Sequence[Case], measured: Sequence[Any]) -> None:
        dense = self._find(DENSE_CASE, task, length)
        score = None if dense is None else dense["score"]
        rows = []
        for case, one in zip(cases, measured, strict=True):
            rows.append(make_row(case.spec, task, length, one, score, self._identity(case)))
            score = rows[-1]["score"] if case == DENSE_CASE else score
        self._results.add(rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None
