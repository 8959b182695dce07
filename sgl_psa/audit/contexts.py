"""Contexts in the line language of the recall model: filler text, set lines, questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

#: Words of keys.
WORDS = """
amber anchor apple basket beacon bottle bridge bronze button candle canyon carpet castle cedar
cherry circle clover copper corner cotton cradle dragon eagle ember falcon feather fiddle flower
forest garden ginger glacier hammer harbor hazel island ivory jacket kettle ladder lantern lemon
marble meadow mirror needle ocean orchid paper pebble pepper piano pillow planet pocket prairie
rabbit ribbon river saddle saffron shadow silver spider summer teapot temple thunder timber tunnel
valley velvet violet walnut willow window winter yellow zephyr
"""
#: Parts of a filler sentence, one part a line, choices divided by bars.
SENTENCE = """
The parser|A request|The scheduler|This function|Each module|The server|A worker|The caller
reads|returns|stores|checks|ignores|writes|replaces|waits for|compares|splits
the first argument|a list of names|the open file|an empty string|the next record|its own buffer
before the call returns.|when the value is missing.|in the order given.|unless the flag is set.
"""


@dataclass(frozen=True)
class Context:
    """Token ids; ``ids[first:]`` are questions with their answers, written line by line."""

    ids: list[int]
    first: int


def make_context(tokenizer: Any, length: int, tail: int, seed: int) -> Context:
    """A context of ``length`` tokens that ends in ``tail`` tokens of questions and answers.

    A third of the body is set lines (``# key value``), the rest ordinary sentences; the questions
    (``? key value``) ask for set lines drawn at random.

    Args:
        tokenizer: called with a text, has ``input_ids``; the first id may be a start mark.
    """
    rng = random.Random(seed)
    words = WORDS.split()
    parts = [line.split("|") for line in SENTENCE.strip().splitlines()]
    lines: dict[str, str] = {}
    body = list(tokenizer("\n").input_ids)

    def add(ids: list[int], text: str) -> list[int]:
        return ids + list(tokenizer(text, add_special_tokens=False).input_ids)

    while len(body) < length - tail:
        if rng.random() < 0.5:
            key = " ".join(rng.sample(words, 2))
            value = f"{rng.randrange(1000):03d}{rng.randrange(1000):03d}"
            if key in lines:
                continue
            lines[key] = value
            body = add(body, f"# {key}{value}\n")
        else:
            body = add(body, " ".join(rng.choice(part) for part in parts) + "\n")
    body = body[: length - tail]
    questions: list[int] = add([], "\n")
    while len(questions) < tail:
        key = rng.choice(list(lines))
        questions = add(questions, f"? {key}{lines[key]}\n")
    return Context(body + questions[:tail], len(body))
