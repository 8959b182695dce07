"""What one decode row is fed: questions and the model's own answers, or a given text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sgl_psa.evaluate.example import Query
from sgl_psa.evaluate.prompt import Prompt


class Feeder(Protocol):
    """Decides the tokens of one row; the runner alternates ``next`` and ``take``."""

    def longest(self) -> int:
        """Most tokens that the row can be fed."""

    def next(self) -> int | None:
        """The next token to feed; ``None``: the row is done."""

    def take(self, logits: torch.Tensor) -> None:
        """The model's scores [vocabulary] after the token that was fed."""


class Answering:
    """Feeds the turns of a query and answers them greedily; ``outputs`` holds the answers."""

    def __init__(self, prompt: Prompt, query: Query, eos: frozenset[int]) -> None:
        self._prompt = prompt
        self._query = query
        self._eos = eos
        self._questions = [
            prompt.turn_ids(turn, first=i == 0) for i, turn in enumerate(query.turns)
        ]
        self._answer: list[int] = []
        self._pending = list(self._questions[0])
        self.outputs: list[str] = []
        self.tokens: list[list[int]] = []

    def longest(self) -> int:
        return sum(map(len, self._questions)) + sum(t.max_tokens for t in self._query.turns)

    def next(self) -> int | None:
        return self._pending.pop(0) if self._pending else None

    def take(self, logits: torch.Tensor) -> None:
        if self._pending:
            return
        turn = self._query.turns[len(self.outputs)]
        token = int(logits.argmax())
        ended = token in self._eos
        if not ended:
            self._answer.append(token)
            ended = bool(turn.stop) and turn.stop in self._prompt.decode([token])
        if not ended and len(self._answer) < turn.max_tokens:
            self._pending = [token]
            return
        self.outputs.append(self._prompt.decode(self._answer))
        self.tokens.append(self._answer)
        self._answer = []
        if len(self.outputs) < len(self._query.turns):
            self._pending = list(self._questions[len(self.outputs)])

    def scores(self) -> list[float]:
        """One grade a turn."""
        return [t.grade(o) for t, o in zip(self._query.turns, self.outputs, strict=True)]


class Forced:
    """Feeds a given text; ``losses`` holds its negative log-likelihoods in nats."""

    def __init__(self, ids: Sequence[int], first: int) -> None:
        """
        Args:
            ids: the text to predict.
            first: the token before it.
        """
        self._fed = [first, *ids[:-1]]
        self._targets = list(ids)
        self.losses: list[float] = []

    def longest(self) -> int:
        return len(self._fed)

    def next(self) -> int | None:
        return self._fed[len(self.losses)] if len(self.losses) < len(self._fed) else None

    def take(self, logits: torch.Tensor) -> None:
        target = self._targets[len(self.losses)]
        self.losses.append(float(-torch.log_softmax(logits.float(), -1)[target]))
