"""The tasks, one table. A task says which prompt styles it can be put in.

The line language of the embedded model has no words for several values of one key or for counting
words, so ``multi_value``, ``common_words`` and ``frequent_words`` exist in plain English only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sgl_psa.evaluate.example import Example, TextExample
from sgl_psa.evaluate.material import PLAIN, RECALL, Material
from sgl_psa.evaluate.tasks import counting, held_out_text, long_generation, needles, tracking

Builder = Callable[[Material, int, random.Random], Example | TextExample]
ACCURACY, PERPLEXITY = "accuracy", "perplexity"


@dataclass(frozen=True)
class Task:
    """A builder for each style; all take (material, tokens of the whole prompt, generator)."""

    summary: str
    builders: Mapping[str, Builder]
    metric: str = ACCURACY

    def build(self, material: Material, length: int, seed: str) -> Example | TextExample:
        """One example of at most ``length`` tokens, answers included; ``seed`` decides it."""
        return self.builders[material.style](material, length, random.Random(seed))


def _both(recall: Builder, plain: Builder) -> dict[str, Builder]:
    return {RECALL: recall, PLAIN: plain}


TASKS: dict[str, Task] = {
    "single": Task(
        "a few needles in ordinary text", _both(needles.single_recall, needles.single_plain)
    ),
    "multi_key": Task(
        "two fifths of the context are needles",
        _both(needles.multi_key_recall, needles.multi_key_plain),
    ),
    "multi_value": Task("keys with four values each", {PLAIN: needles.multi_value_plain}),
    "all_needle": Task(
        "nothing but needles", _both(needles.all_needle_recall, needles.all_needle_plain)
    ),
    "tracking": Task("follow a value through assignments", _both(tracking.recall, tracking.plain)),
    "common_words": Task("the ten most common of a word list", {PLAIN: counting.common_words}),
    "frequent_words": Task("the three most frequent of a text", {PLAIN: counting.frequent_words}),
    "long_generation": Task(
        "many answers in one long decode", _both(long_generation.recall, long_generation.plain)
    ),
    "text": Task(
        "perplexity of held-out text", _both(held_out_text.build, held_out_text.build), PERPLEXITY
    ),
}

__all__ = ["ACCURACY", "PERPLEXITY", "TASKS", "Task"]
