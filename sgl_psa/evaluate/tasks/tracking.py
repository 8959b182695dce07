"""Variable tracking: a value is passed on from name to name (after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import itertools
import random
import string

from sgl_psa.evaluate.example import Example, Query, Turn
from sgl_psa.evaluate.material import Keys, Material, number
from sgl_psa.evaluate.tasks.needles import recall_turn

_ASKED = 10
_RESERVE = 80
_PLAIN_RESERVE = 160
_SHARE = 0.15
_PLAIN_HOPS = 4


def recall(material: Material, length: int, rng: random.Random) -> Example:
    """Chains of two or three keys; ``> key`` is answered by the rest of the chain."""
    tokens = length - _RESERVE
    keys, chains, used = Keys(material.words, rng), list[tuple[str, str, list[str]]](), 0
    while True:
        chain, value = [keys.draw() for _ in range(rng.choice((2, 3)))], number(rng)
        lines = [f"# {a} {b}" for a, b in itertools.pairwise(chain)]
        lines = [f"# {chain[-1]}{value}", *reversed(lines)]
        used += sum(material.count(line + "\n") for line in lines)
        if used > tokens * _SHARE and chains:
            break
        chains.append((f"> {chain[0]}", f" {' '.join(chain[1:])}{value}", lines))
    context = material.weave(interleave([lines for _, _, lines in chains], rng), tokens, rng)
    asked = rng.sample(chains, min(_ASKED, len(chains)))
    turns = [recall_turn(material, question, answer) for question, answer, _ in asked]
    return Example(context, tuple(Query((turn,)) for turn in turns))


def interleave(sequences: list[list[str]], rng: random.Random) -> list[str]:
    """All items in random order, but each sequence in its own."""
    order = [i for i, items in enumerate(sequences) for _ in items]
    rng.shuffle(order)
    iterators = [iter(items) for items in sequences]
    return [next(iterators[i]) for i in order]


def plain(material: Material, length: int, rng: random.Random) -> Example:
    """Chains of variables; asked for all that hold a value."""
    tokens = length - _PLAIN_RESERVE
    chains, used, taken = list[tuple[str, list[str], list[str]]](), 0, set[str]()
    while len(chains) < _ASKED:
        chain, value = [_variable(taken, rng) for _ in range(_PLAIN_HOPS + 1)], number(rng)
        lines = [f"VAR {chain[0]} = {value}"]
        lines += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(chain)]
        used += sum(material.count(line + "\n") for line in lines)
        if used > tokens * _SHARE and chains:
            break
        chains.append((value, chain, lines))
    context = (
        "Memorize the variable assignments hidden in the text below.\n\n"
        + material.weave(interleave([lines for _, _, lines in chains], rng), tokens, rng)
        + "\n"
    )
    queries = [
        Query(
            (
                Turn(
                    f"Find all {_PLAIN_HOPS + 1} variables that are assigned the value {value}, "
                    "directly or through other variables.",
                    tuple(chain),
                    60,
                    prefix=f" The variables that are assigned the value {value} are:",
                ),
            )
        )
        for value, chain, _ in chains
    ]
    return Example(context, tuple(queries))


def _variable(taken: set[str], rng: random.Random) -> str:
    """Five capital letters that are not taken yet."""
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in taken:
            taken.add(name)
            return name
