"""Queries and keys of a transformers model, as its attention layers see them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

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


class CaptureModel:
    """A causal LM whose attention layers hand out q, k and v."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._seen: list[tuple[torch.Tensor, ...]] = []

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
            self._seen.append((q[0], k[0], v[0]))
            return sdpa_attention_forward(module, q, k, v, mask, is_causal=True, **options)

        AttentionInterface.register("capture", attend)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="capture"
        ).eval()

    @torch.no_grad()
    def run(self, context: str, queries: list[tuple[str, str]], count: int) -> Capture:
        """Prefill ``context``, the questions and their answers.

        Args:
            queries: (question, answer) pairs.
            count: answer positions to keep, evenly spread over all of them.
        """
        ids = self.tokenizer(context).input_ids
        places = []
        for question, answer in queries:
            head = self.tokenizer(question, add_special_tokens=False).input_ids
            tail = self.tokenizer(answer, add_special_tokens=False).input_ids
            ids += head
            # The position that predicts an answer token is the one before it.
            places += list(range(len(ids) - 1, len(ids) - 1 + len(tail)))
            ids += tail + self.tokenizer("\n", add_special_tokens=False).input_ids
        count = min(count, len(places))
        positions = [places[i * len(places) // count] for i in range(count)]
        self._seen.clear()
        self.model.model(torch.tensor([ids]))
        layers = [
            LayerCapture(
                *(x.transpose(0, 1).bfloat16().contiguous() for x in (q[:, positions], k, v))
            )
            for q, k, v in self._seen
        ]
        self._seen.clear()
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
    model = CaptureModel(folder)
    material = Material(model.tokenizer, RECALL)
    captures = []
    for task, seed in itertools.product(tasks, range(contexts)):
        example = TASKS[task].build(material, tokens, str(seed))
        assert isinstance(example, Example)
        turns = [query.turns[0] for query in example.queries]
        random.Random(seed).shuffle(turns)
        queries = [(turn.question, turn.answers[0]) for turn in turns[:6]]
        captures.append(model.run(example.context, queries, positions))
    return captures
