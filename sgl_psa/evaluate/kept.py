"""Measurements that are kept: what is in the results already is not measured again."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_psa.evaluate import policy_spec
from sgl_psa.evaluate.material import Material
from sgl_psa.evaluate.measurement import Progress, Runner, build_examples
from sgl_psa.evaluate.policy_spec import DENSE, PolicySpec
from sgl_psa.evaluate.results import Results, Row, make_row
from sgl_psa.evaluate.tasks import TASKS

#: A task, a length, and the specs to measure there.
Work = tuple[str, int, list[PolicySpec]]
_DENSE = policy_spec.parse(DENSE)


class KeptRuns:
    """One runner's part of a results file, for questions of one kind.

    Attributes:
        queries: questions a task.
    """

    def __init__(
        self, runner: Runner, results: Results, material: Material, *, queries: int, seed: int
    ) -> None:
        self.runner = runner
        self.results = results
        self.queries = queries
        self._material = material
        self._seed = seed
        asked = {"style": material.style, "seed": seed, "asked": queries}
        self._identity: Row = {**runner.identity, **asked}

    def find(self, task: str, length: int, spec: PolicySpec) -> Row | None:
        """The row that is there already."""
        key = {"task": task, "length": length, "spec": spec.text}
        return self.results.find({**self._identity, **key})

    def missing(
        self, tasks: Sequence[str], lengths: Sequence[int], specs: Sequence[PolicySpec]
    ) -> list[Work]:
        """What is not there yet; says what the runner cannot do."""
        work, refused = list[Work](), dict[tuple[str, str], list[str]]()
        for length in lengths:
            for task in tasks:
                some = []
                for spec in specs:
                    reason = self.runner.refuses(TASKS[task], spec)
                    if reason:
                        refused.setdefault((task, reason), []).append(spec.text)
                    elif not self.find(task, length, spec):
                        some.append(spec)
                if some:
                    work.append((task, length, some))
        for (task, reason), left in refused.items():
            print(f"left out on {task}: {', '.join(dict.fromkeys(left))}: {reason}")
        return work

    def measure(self, work: Work, progress: Progress, dense: Row | None = None) -> None:
        """Measure, and add the rows to the file.

        Args:
            dense: the row to compare with, where another runner measured it; otherwise dense is the
                first spec of ``work``, or was measured before.
        """
        task, length, specs = work
        examples = build_examples(
            TASKS[task], task, self._material, length, self.queries, self._seed
        )
        measured = self.runner.measure(examples, specs, progress)
        dense = dense or self.find(task, length, _DENSE)
        dense_score = None if dense is None else dense["score"]
        rows = []
        for spec, one in zip(specs, measured, strict=True):
            rows.append(make_row(spec, task, length, one, dense_score, self._identity))
            if spec.text == DENSE:
                dense_score = rows[-1]["score"]
        self.results.add(rows)
