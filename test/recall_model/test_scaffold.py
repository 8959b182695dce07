"""The constructed weights recall before any training."""

from __future__ import annotations

import random

import pytest
import torch

from benchmark.recall_model.flags import Flag, KnownTokens
from benchmark.recall_model.model import RecallModel, Shape
from benchmark.recall_model.scaffold import construct

NEWLINE, SET, ASK, CHAIN = 1, 2, 3, 4
NUMBERS = tuple(range(10, 210))
WORDS = range(210, 2048)
TOKENS = KnownTokens(NEWLINE, (SET, ASK, CHAIN), NUMBERS)


@pytest.fixture(scope="module")
def model() -> RecallModel:
    torch.manual_seed(0)
    model = RecallModel(Shape(vocabulary=2048, positions=4096))
    construct(model, TOKENS)
    return model


def lines(keys: list[list[int]], values: list[list[int]], rng: random.Random) -> list[int]:
    """A text with one set line for each key, between lines of random words."""
    ids = [NEWLINE]
    for key, value in zip(keys, values, strict=True):
        ids += [*rng.sample(WORDS, rng.randint(5, 40)), NEWLINE, SET, *key, *value, NEWLINE]
    return ids


def share_right(model: RecallModel, text: list[int], asked: list[tuple[list[int], int]]) -> float:
    """Share of the lines after the text whose tokens from `start` on are all arg maxima."""
    ids, spans = list(text), list[range]()
    for line, start in asked:
        spans.append(range(len(ids) + start, len(ids) + len(line)))
        ids += line
    row = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.hidden(row, torch.arange(len(ids))[None])[0]
        found = (hidden @ model.embedding.T).argmax(-1).tolist()
    return sum(all(found[p - 1] == ids[p] for p in span) for span in spans) / len(spans)


def test_set_lines_are_completed(model: RecallModel) -> None:
    rng = random.Random(1)
    keys = [rng.sample(WORDS, rng.randint(1, 3)) for _ in range(40)]
    values = [[rng.choice(NUMBERS), rng.choice(NUMBERS)] for _ in keys]
    asked = [
        ([ASK, *key, *value, NEWLINE], 1 + len(key))
        for key, value in zip(keys, values, strict=True)
    ]
    assert share_right(model, lines(keys, values, rng), asked) >= 0.95


def test_chains_are_followed_past_the_longer_match(model: RecallModel) -> None:
    """`# B A` ends in a newline after `B A`; the chain `> B A` has to go on with A's value."""
    rng = random.Random(2)
    ends = [rng.sample(WORDS, 2) for _ in range(30)]
    links = [rng.sample(WORDS, 2) for _ in ends]
    values = [[rng.choice(NUMBERS), rng.choice(NUMBERS)] for _ in ends]
    text = lines(ends + links, values + ends, rng)
    chains = [
        ([CHAIN, *link, *end, *value, NEWLINE], 3)
        for link, end, value in zip(links, ends, values, strict=True)
    ]
    assert share_right(model, text, chains) >= 0.7
    # The same lines asked with `?` end where the set line ends.
    asked = [([ASK, *link, *end, NEWLINE], 3) for link, end in zip(links, ends, strict=True)]
    assert share_right(model, text, asked) >= 0.9


def test_fixed_coordinates_survive_a_training_step() -> None:
    model = RecallModel(Shape(vocabulary=2048, positions=64))
    fixed = construct(model, TOKENS)
    with torch.no_grad():
        model.embedding.add_(torch.randn_like(model.embedding) * 0.1)
        fixed.hold(model.embedding)
        constant = model.embedding[:, fixed.constant]
        flags = model.embedding[:, -len(Flag) :]
        rest = model.embedding.clone()
        rest[:, fixed.constant] = 0
        rest[:, -len(Flag) :] = 0
    assert torch.allclose(constant, fixed.share * rest.norm(dim=1))
    assert torch.equal(flags, fixed.flags * constant[:, None])
