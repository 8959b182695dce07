"""Needles: keys with numbers somewhere in the context, asked for one by one.

After RULER (arXiv 2404.06654), in wording of its own.
"""

from __future__ import annotations

import random

from sgl_psa.evaluate.example import Example, Query, Turn
from sgl_psa.evaluate.material import Keys, Material, number

_FEW = 8
_ASKED = 20
_RESERVE = 40  # tokens kept for the question and its answer
_PLAIN_RESERVE = 120
_INTRODUCTION = "Secret numbers are hidden in the text below. Remember them.\n\n"

Pairs = list[tuple[str, str]]


def recall_turn(material: Material, question: str, answer: str) -> Turn:
    """A question in the line language; the answer is the rest of the line."""
    return Turn(question, (answer,), material.count(answer) + 1, exact=True, stop="\n")


def set_lines(material: Material, rng: random.Random, tokens: int) -> tuple[Pairs, list[str]]:
    """Keys with numbers, and their ``#`` lines: as many as ``tokens`` hold."""
    keys, pairs, lines, used = Keys(material.words, rng), Pairs(), list[str](), 0
    while True:
        key, value = keys.draw(), number(rng)
        line = f"# {key}{value}"
        used += material.count(line + "\n")
        if used > tokens:
            return pairs, lines
        pairs.append((key, value))
        lines.append(line)


def _recall(
    material: Material, length: int, rng: random.Random, share: float, most: int
) -> Example:
    tokens = length - _RESERVE
    pairs, lines = set_lines(material, rng, int(tokens * share))
    pairs, lines = pairs[:most], lines[:most]
    context = material.weave(lines, tokens, rng)
    asked = rng.sample(pairs, min(_ASKED, len(pairs)))
    turns = [recall_turn(material, f"? {key}", value) for key, value in asked]
    return Example(context, tuple(Query((turn,)) for turn in turns))


def single_recall(material: Material, length: int, rng: random.Random) -> Example:
    return _recall(material, length, rng, 0.5, _FEW)


def multi_key_recall(material: Material, length: int, rng: random.Random) -> Example:
    return _recall(material, length, rng, 0.4, length)


def all_needle_recall(material: Material, length: int, rng: random.Random) -> Example:
    return _recall(material, length, rng, 1.0, length)


def plain_lines(
    material: Material, rng: random.Random, tokens: int, values: int
) -> tuple[list[tuple[str, tuple[str, ...]]], list[str]]:
    """Keys with ``values`` numbers each, and their sentences: as many as ``tokens`` hold."""
    keys, lines, used = Keys(material.words, rng), list[str](), 0
    pairs = list[tuple[str, tuple[str, ...]]]()
    while True:
        key, numbers = keys.draw(), tuple(number(rng) for _ in range(values))
        fresh = [f"A secret number of {key} is {value}." for value in numbers]
        used += sum(material.count(line + "\n") for line in fresh)
        if used > tokens:
            return pairs, lines
        pairs.append((key, numbers))
        lines += fresh


def _plain(
    material: Material, length: int, rng: random.Random, share: float, most: int, values: int = 1
) -> Example:
    tokens = length - _PLAIN_RESERVE
    pairs, lines = plain_lines(material, rng, int(tokens * share), values)
    pairs, lines = pairs[:most], lines[: most * values]
    rng.shuffle(lines)
    context = _INTRODUCTION + material.weave(lines, tokens, rng) + "\n"
    queries = []
    for key, numbers in rng.sample(pairs, min(_ASKED, len(pairs))):
        if values == 1:
            question = f"What is the secret number of {key}?"
            prefix = f" The secret number of {key} is"
        else:
            question = f"What are all {values} secret numbers of {key}?"
            prefix = f" The secret numbers of {key} are"
        queries.append(Query((Turn(question, numbers, 12 * values + 8, prefix=prefix),)))
    return Example(context, tuple(queries))


def single_plain(material: Material, length: int, rng: random.Random) -> Example:
    return _plain(material, length, rng, 0.5, _FEW)


def multi_key_plain(material: Material, length: int, rng: random.Random) -> Example:
    return _plain(material, length, rng, 0.4, length)


def multi_value_plain(material: Material, length: int, rng: random.Random) -> Example:
    return _plain(material, length, rng, 0.5, _FEW, values=4)


def all_needle_plain(material: Material, length: int, rng: random.Random) -> Example:
    return _plain(material, length, rng, 1.0, length)
