"""Queries and keys of a transformers model, as its attention layers see them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import NamedTuple

import torch

from sgl_psa.audit.capture import CapturedModel
from sgl_psa.evaluate.example import Example
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.tasks import TASKS


class LayerCapture(NamedTuple):
    """One layer, after rotary embedding: q [positions, Hq, D], k and v [tokens, Hkv, D], bf16."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Capture(NamedTuple):
    """One context: the captured layers, and the positions (token indices) of the queries."""

    layers: list[LayerCapture]
    positions: list[int]


def capture(
    model: CapturedModel, context: str, queries: list[tuple[str, str]], count: int
) -> Capture:
    """Prefill ``context``, the questions and their answers.

    Args:
        queries: (question, answer) pairs.
        count: answer positions to keep, evenly spread over all of them.
    """

    def encode(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    ids = model.tokenizer(context).input_ids
    first, places = len(ids), []
    for question, answer in queries:
        ids += encode(question)
        tail = encode(answer)
        # The position that predicts an answer token is the one before it.
        places += list(range(len(ids) - 1, len(ids) - 1 + len(tail)))
        ids += tail + encode("\n")
    count = min(count, len(places))
    positions = [places[i * len(places) // count] for i in range(count)]
    kept = [place - first for place in positions]
    layers = [
        LayerCapture(*(x.transpose(0, 1).bfloat16().contiguous() for x in (q[:, kept], k, v)))
        for q, k, v, _ in model.layers(ids, len(ids) - first)
    ]
    return Capture(layers, positions)


def recall_captures(
    folder: str | Path, tasks: list[str], tokens: int, contexts: int, positions: int
) -> list[Capture]:
    """Captures of recall contexts: set lines in filler text, then questions with their answers.

    Args:
        tasks: keys of ``sgl_psa.evaluate.tasks.TASKS`` whose questions have one exact answer.
        tokens: most tokens of a context.
        contexts: of each task.
        positions: answer positions a context.
    """
    model = CapturedModel(folder)
    material = Material(model.tokenizer, RECALL)
    captures = []
    for task, seed in itertools.product(tasks, range(contexts)):
        example = TASKS[task].build(material, tokens, str(seed))
        assert isinstance(example, Example)
        turns = [query.turns[0] for query in example.queries]
        random.Random(seed).shuffle(turns)
        queries = [(turn.question, turn.answers[0]) for turn in turns[:6]]
        captures.append(capture(model, example.context, queries, positions))
    return captures
