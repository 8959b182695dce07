"""What a runner hands back: grades and what was read, for one policy, task and length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sgl_psa.evaluate.example import Example, Query, TextExample
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.tasks import PERPLEXITY, Task

#: Called with the number of queries that are done.
Progress = Callable[[int], None]


@dataclass
class Reads:
    """Sums over decode steps, layers and KV heads; ``estimates`` terms have a known coverage.

    ``bytes_attended`` are those of ``bytes_read`` that are K and V of attended pages; 0: not known.
    """

    bytes_read: float = 0.0
    bytes_dense: float = 0.0
    bytes_attended: float = 0.0
    pages_attended: float = 0.0
    pages_total: float = 0.0
    visits: float = 0.0
    rounds: float = 0.0
    coverage: float = 0.0
    estimates: float = 0.0

    def add(self, **sums: float) -> None:
        """Add to the named sums."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)

    def fractions(self) -> dict[str, float | None]:
        """The columns of a result row; ``None`` where no decode step ran or it is not known.

        ``scored_fraction`` is the part of ``bytes_fraction`` that is not K and V of attended pages:
        what was read to score pages, or to make up for those left out. ``head_bytes`` are the
        bytes that a decode step reads in a layer and KV head.
        """
        known = self.bytes_attended > 0
        scored = self.bytes_read - self.bytes_attended
        return {
            "bytes_fraction": _ratio(self.bytes_read, self.bytes_dense),
            "pages_fraction": _ratio(self.pages_attended, self.pages_total),
            "scored_fraction": _ratio(scored, self.bytes_dense) if known else None,
            "head_bytes": _ratio(self.bytes_read, self.visits) if known else None,
            "rounds": _ratio(self.rounds, self.visits),
            "coverage": _ratio(self.coverage, self.estimates),
        }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


@dataclass
class Measurement:
    """One policy on one task at one length.

    Attributes:
        grades: one a question, 0 to 1.
        losses: nats a token, of the text task.
        queries: questions, or spans of text.
        heads: float64 [L, Hkv, 2], pages attended and rounds, in process only.
        head_pages, head_steps: what ``heads`` is a share of.
    """

    grades: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    queries: int = 0
    reads: Reads = field(default_factory=Reads)
    heads: torch.Tensor | float = 0.0
    head_pages: int = 0
    head_steps: int = 0

    def score(self, metric: str) -> float:
        """Mean grade, or perplexity."""
        if metric == PERPLEXITY:
            return round(math.exp(sum(self.losses) / len(self.losses)), 4)
        return round(sum(self.grades) / len(self.grades), 6)

    def by_head(self) -> dict[str, list[list[float]]]:
        """Pages fraction and rounds, by layer and KV head; empty over HTTP."""
        if not isinstance(self.heads, torch.Tensor):
            return {}
        pages = (self.heads[..., 0] / self.head_pages).tolist()
        rounds = (self.heads[..., 1] / self.head_steps).tolist()
        return {
            "pages_by_head": [[round(x, 5) for x in layer] for layer in pages],
            "rounds_by_head": [[round(x, 4) for x in layer] for layer in rounds],
        }


class Runner(Protocol):
    """Has examples answered under policies."""

    #: What the rows say of where they come from: model, fingerprint, runner.
    identity: dict[str, Any]

    def refuses(self, task: Task, spec: PolicySpec) -> str | None:
        """Why this runner cannot measure ``spec`` on ``task``; ``None`` if it can."""

    def measure(
        self,
        examples: Sequence[Example | TextExample],
        specs: Sequence[PolicySpec],
        progress: Progress,
    ) -> list[Measurement]:
        """One measurement a spec, each over all examples."""


def questions(example: Example | TextExample) -> int:
    """Questions, or spans of text, in an example."""
    if isinstance(example, TextExample):
        return len(example.spans)
    return sum(len(query.turns) for query in example.queries)


def build_examples(
    task: Task, name: str, material: Any, length: int, queries: int, seed: int
) -> list[Example | TextExample]:
    """Examples with ``queries`` questions in all; the last keeps only what is needed."""
    examples = list[Example | TextExample]()
    missing = queries
    while missing > 0:
        example = task.build(material, length, f"{name}/{length}/{seed}/{len(examples)}")
        example = _first(example, missing)
        missing -= questions(example)
        examples.append(example)
    return examples


def _first(example: Example | TextExample, most: int) -> Example | TextExample:
    if isinstance(example, TextExample):
        return TextExample(example.ids, example.spans[:most])
    kept = []
    for query in example.queries:
        if most > 0:
            kept.append(Query(query.turns[:most]))
        most -= len(query.turns)
    return Example(example.context, tuple(kept))
