"""Long generation: many answers one after the other, each from a cache that the policy wrote.

Errors of a policy build up here: what is decoded later reads what was decoded before.
"""

from __future__ import annotations

import random

from sgl_psa.evaluate.example import Example, Query, Turn
from sgl_psa.evaluate.material import Material
from sgl_psa.evaluate.tasks.needles import plain_lines, recall_turn, set_lines

_TURNS = 20
_TURN_TOKENS = 20
_PLAIN_TOKENS = 24
_SHARE = 0.2


def recall(material: Material, length: int, rng: random.Random) -> Example:
    """One decode with twenty turns, each a ``?`` line and its answer."""
    tokens = length - _TURNS * _TURN_TOKENS
    pairs, lines = set_lines(material, rng, int(tokens * _SHARE))
    context = material.weave(lines, tokens, rng)
    asked = rng.sample(pairs, min(_TURNS, len(pairs)))
    turns = tuple(recall_turn(material, f"? {key}", value) for key, value in asked)
    return Example(context, (Query(turns),))


def plain(material: Material, length: int, rng: random.Random) -> Example:
    """Twenty keys with their numbers, to be listed in the order of the text."""
    tokens = length - _TURNS * _PLAIN_TOKENS - 100
    pairs, lines = plain_lines(material, rng, tokens, 1)
    pairs, lines = pairs[:_TURNS], lines[:_TURNS]
    context = "Secret numbers are hidden in the text below. Remember them.\n\n"
    context += material.weave(lines, tokens, rng) + "\n"
    turn = Turn(
        f"List all {len(pairs)} secret numbers in the order of the text, "
        "one a line, as: key: number",
        tuple(f"{key}: {numbers[0]}" for key, numbers in pairs),
        len(pairs) * _PLAIN_TOKENS,
        prefix=" The secret numbers are:\n",
    )
    return Example(context, (Query((turn,)),))
