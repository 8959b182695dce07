"""Result rows and the file that holds them; what is there is never measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sgl_psa.evaluate.measurement import Measurement
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.tasks import TASKS

Row = dict[str, Any]
#: The columns that every row has, in this order; others may follow.
COLUMNS = (
    "policy",
    "scorer",
    "stop",
    "knob",
    "task",
    "length",
    "queries",
    "score",
    "dense_score",
    "bytes_fraction",
    "pages_fraction",
)
_IDENTITY = ("model", "fingerprint", "runner", "style", "seed", "asked", "task", "length", "spec")


def make_row(
    spec: PolicySpec,
    task: str,
    length: int,
    measured: Measurement,
    dense_score: float | None,
    identity: Row,
) -> Row:
    """One row; ``dense_score`` is ``None`` for dense itself."""
    metric = TASKS[task].metric
    score = measured.score(metric)
    fractions = measured.reads.fractions()
    return {
        "policy": spec.policy,
        "scorer": spec.scorer,
        "stop": spec.stop,
        "knob": spec.knob,
        "task": task,
        "length": length,
        "queries": measured.queries,
        "score": score,
        "dense_score": score if dense_score is None else dense_score,
        "bytes_fraction": fractions.pop("bytes_fraction"),
        "pages_fraction": fractions.pop("pages_fraction"),
        "metric": metric,
        "spec": spec.text,
        "curve": spec.curve,
        "sketch_bits": spec.config.sketch_bits,
        "knob_name": spec.knob_name,
        **fractions,
        **identity,
        "grades": [round(grade, 4) for grade in measured.grades],
        **measured.by_head(),
    }


class Results:
    """The rows of one file, written whole after every change."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: the file is there and is no list of rows.
        """
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            try:
                self.rows = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): move it away") from None
            if not isinstance(self.rows, list):
                raise ValueError(f"{path} is no list of rows: move it away")

    def find(self, identity: Row) -> Row | None:
        """The row of the same model, style, seed, task, length and spec."""
        return next((row for row in self.rows if _same(row, identity)), None)

    def drop_outdated(self, model: str, fingerprint: str) -> int:
        """Forget rows of another content of the same model folder; returns how many."""
        if not fingerprint:
            return 0
        kept = [
            row
            for row in self.rows
            if row.get("model") != model or row.get("fingerprint") in ("", fingerprint)
        ]
        dropped = len(self.rows) - len(kept)
        self.rows = kept
        return dropped

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        os.replace(partial, self.path)


def _same(row: Row, identity: Row) -> bool:
    return all(row.get(key) == identity[key] for key in _IDENTITY)
