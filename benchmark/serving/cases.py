"""What is served: models, contexts, batches, and how often."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmark.serving import random_llama
from benchmark.serving.systems import ROOT

RECALL = "recall"
RANDOM = "random_llama"
_RECALL_FOLDER = ROOT / "sgl_psa" / "assets" / "recall"


@dataclass(frozen=True)
class Case:
    """``batch`` requests at once that end at ``context`` tokens each, new ones included."""

    model: str
    context: int
    batch: int
    rounds: int

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.context * self.batch


class Model(NamedTuple):
    """A folder and what its memory follows from.

    Attributes:
        kv_bytes: of a token, all layers.
        words: token ids that prompts are made of, from and to.
    """

    folder: Path
    weight_bytes: int
    kv_bytes: int
    words: tuple[int, int]


def model(name: str, folder: Path) -> Model:
    """The model of that name; a random one is made below ``folder``."""
    if name == RANDOM:
        place, words = random_llama.make(folder / RANDOM), (3, random_llama.VOCAB - 5)
    else:
        place, words = _RECALL_FOLDER, (300, 4000)
    config = json.loads((place / "config.json").read_text())
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    weight_bytes = (place / "model.safetensors").stat().st_size
    return Model(place, weight_bytes, 4 * heads * config["head_dim"], words)


def prompts(case: Case, words: tuple[int, int], new_tokens: int, seed: int) -> list[list[int]]:
    """Random ids, so that no two requests share a prefix; the same for every system."""
    rng = np.random.default_rng([seed, case.context, case.batch])
    length = case.context - new_tokens
    made: list[list[int]] = rng.integers(*words, (case.batch, length)).tolist()
    return made


DEFAULT = (
    Case(RECALL, 1024, 1, 3),
    Case(RECALL, 1024, 4, 3),
    Case(RECALL, 8192, 1, 2),
    Case(RECALL, 8192, 4, 1),
    Case(RECALL, 16384, 1, 1),
    Case(RECALL, 16384, 4, 1),
    Case(RANDOM, 1024, 1, 3),
    Case(RANDOM, 1024, 4, 2),
    Case(RANDOM, 8192, 1, 1),
)
#: Prefill of the random model is most of it: minutes for 8k tokens in one thread, half an hour for
#: 32k, for every request and system.
FULL = (
    *DEFAULT,
    Case(RANDOM, 8192, 4, 1),
    Case(RANDOM, 32768, 1, 1),
    Case(RANDOM, 32768, 4, 1),
)
QUICK = (Case(RECALL, 1024, 1, 1), Case(RECALL, 1024, 4, 1), Case(RECALL, 4096, 1, 1))
