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
from sgl_psa.evaluate.kept import KeptRuns
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.paged_model import PAGE_SIZE
from sgl_psa.evaluate.policy_spec import DENSE, PolicySpec
from sgl_psa.evaluate.results import Results, Row
from sgl_psa.evaluate.tasks import ACCURACY
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
        self._runs: dict[tuple[int, bool], KeptRuns] = {}
        fingerprint = self._of(DENSE_CASE).runner.identity["fingerprint"]
        self._results.drop_outdated("embedded", fingerprint)

    def measure(self, cases: Iterable[Case], length: int) -> None:
        """Every case, and dense, on every task; rows are kept after each task."""
        models: dict[tuple[int, bool], list[Case]] = {}
        for case in dict.fromkeys([DENSE_CASE, *cases]):
            models.setdefault(case[1:], []).append(case)
        work = [
            (some[0], missing)
            for some in models.values()
            for missing in self._of(some[0]).missing(
                self.tasks, [length], [case.spec for case in some]
            )
        ]
        count = self._arguments.queries
        with tqdm(total=sum(len(specs) for _, (*_, specs) in work) * count, unit="query") as bar:
            for case, missing in work:
                heads = "" if case.share_heads else ", heads apart"
                bar.set_description(f"{length} {missing[0]}, pages of {case.page_size}{heads}")
                dense = self._of(DENSE_CASE).find(missing[0], length, DENSE_CASE.spec)
                self._of(case).measure(missing, bar.update, dense)

    def row(self, case: Case, task: str, length: int) -> Row:
        """What ``measure`` found."""
        found = self._of(case).find(task, length, case.spec)
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

    def _of(self, case: Case) -> KeptRuns:
        """The runs of the model that a case runs in."""
        key = case[1:]
        if key not in self._runs:
            runner = InProcess(
                self._model,
                self._tokenizer,
                name="embedded",
                folder=EMBEDDED,
                chat=False,
                batch=self._arguments.batch,
                page_size=case.page_size,
                share_heads=case.share_heads,
            )
            self._runs[key] = KeptRuns(
                runner,
                self._results,
                self._material,
                queries=self._arguments.queries,
                seed=self._arguments.seed,
            )
        return self._runs[key]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None
