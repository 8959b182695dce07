"""Contexts of an exact length in the line language of the embedded model, from the evaluation's
material: set lines in filler text, then questions with their answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sgl_psa.evaluate.material import RECALL, ContextTooShort, Material
from sgl_psa.evaluate.tasks.needles import set_lines

_SHARE = 1 / 3


@dataclass(frozen=True)
class Context:
    """Token ids; ``ids[first:]`` are questions with their answers, written line by line."""

    ids: list[int]
    first: int


def make_context(tokenizer: Any, length: int, tail: int, seed: int) -> Context:
    """A context of ``length`` tokens that ends in ``tail`` tokens of questions and answers.

    A third of the body is set lines (``# key value``), the rest held-out text; the questions
    (``? key value``) ask for set lines drawn at random. A model that does not know the line
    language still has repeated lines to attend to.

    Args:
        tokenizer: of transformers; a start mark that it adds comes first.

    Raises:
        ContextTooShort: no set line fits into the body.
    """
    rng = random.Random(seed)
    material = _material(tokenizer)
    *start, newline = tokenizer("\n").input_ids
    room = length - tail - len(start) - 1
    pairs, lines = set_lines(material, rng, int(room * _SHARE))
    if not pairs:
        raise ContextTooShort(f"{length} tokens, {tail} of them questions: ask for a longer length")
    woven = material.encode(material.weave(lines, room, rng))
    # What no line of filler was short enough for is a piece of text before the first line.
    body = [*start, *material.text_ids[: room - len(woven)], newline, *woven]
    questions = list[int]()
    while len(questions) < tail:
        key, value = rng.choice(pairs)
        questions += material.encode(f"? {key}{value}\n")
    return Context(body + questions[:tail], len(body))


@lru_cache(maxsize=2)
def _material(tokenizer: Any) -> Material:
    """Words and counted lines are the same for every context of a tokenizer."""
    return Material(tokenizer, RECALL)
