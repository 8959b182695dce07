"""Evaluation contexts: what is asked, and where the answers stand.

needle      a few set lines in ordinary text, all queried at the end
multi_key   set lines are 40 % of the context, the rest is ordinary text
all_needle  nothing but set lines
variable    chains of one to five hops among 15 % set lines; the model writes the whole chain
Keys are one or two words drawn evenly from the given word list, values are numbers of three or
six digits (in multi_key and all_needle one in five is one or two words).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .lexicon import Word
from .lines import Kind, Line, Store
from .prepare import Data
from .rows import Row


@dataclass(frozen=True)
class Task:
    """queries: most questions in a context; query_tokens: room kept for each.

    fill: share of the context that is set lines (0: exactly `queries` lines); chain and
    word_share: shares of set lines whose value is a key, or words.
    """

    queries: int
    query_tokens: int
    fill: float
    chain: float = 0.0
    word_share: float = 0.0


TASKS = {
    "needle": Task(8, 12, 0.0),
    "multi_key": Task(20, 12, 0.4, word_share=0.2),
    "all_needle": Task(20, 12, 1.0, word_share=0.2),
    "variable": Task(10, 26, 0.15, chain=0.6),
}


@dataclass(frozen=True)
class Question:
    """Answer tokens stand at ids[start:stop] of the context; depth: place of its set line, 0-1."""

    start: int
    stop: int
    depth: float
    hops: int


@dataclass(frozen=True)
class Context:
    """Token ids (at most the asked length) and the questions in them."""

    ids: list[int]
    questions: list[Question]


class ContextMaker:
    """Makes contexts from the validation text and one word list."""

    def __init__(self, data: Data, words: list[Word], style: str = "") -> None:
        self.data, self.words, self.style = data, words, style
        self.newline = data.lexicon.symbols["\n"][0]
        self._line_ends = np.flatnonzero(data.validation == self.newline)

    def make(self, task: Task, length: int, seed: int) -> Context:
        rng = random.Random(seed)
        store = Store(
            rng, self.data.lexicon, lambda: rng.choice(self.words), (0.3, 0.7, 0.0), self.style
        )
        tail = task.queries * task.query_tokens
        body = length - tail
        lines: list[tuple[tuple[int, ...], Line]] = []
        used = 0
        while used < body * task.fill - 20 or len(lines) < task.queries:
            lines.append(store.set_line(task.chain, task.word_share))
            used += len(lines[-1][1].ids)
        row, depth = Row(length), dict[tuple[int, ...], float]()
        free = max(0, body - used)
        cuts = sorted(rng.randrange(free + 1) for _ in lines)
        done = 0
        for (key, line), cut in zip(lines, cuts, strict=True):
            done += self._put_text(row, cut - done, rng)
            depth[key] = len(row.ids) / length
            row.put(line, self.newline)
        for _ in range(8):
            done += self._put_text(row, free - done, rng)
        return Context(row.ids, self._ask(task, store, row, depth, rng))

    def _put_text(self, row: Row, count: int, rng: random.Random) -> int:
        """Whole lines of ordinary text, at most count tokens; the number of tokens added."""
        stream, ends = self.data.validation, self._line_ends
        if count < 8:
            return 0
        start = int(ends[rng.randrange(len(ends))]) + 1
        last = int(np.searchsorted(ends, start + count, side="right")) - 1
        stop = int(ends[max(0, last)]) + 1
        piece = stream[start:stop].tolist()
        first = [] if row.ids[-1] == self.newline else [self.newline]
        ids = first + piece if stop > start else []
        row.ids += ids
        row.kinds += [Kind.IGNORED] * len(ids)
        return len(ids)

    def _ask(
        self,
        task: Task,
        store: Store,
        row: Row,
        depth: dict[tuple[int, ...], float],
        rng: random.Random,
    ) -> list[Question]:
        keys = [k for k, e in store.entries.items() if e.hops > 0 or not task.chain]
        questions: list[Question] = []
        for key in rng.sample(keys, min(task.queries, len(keys))):
            hops = store.entries[key].hops
            line = store.chain_line(key) if hops else store.query_line(key)
            if len(row.ids) + len(line.ids) > row.length:
                break
            row.put(line, self.newline)
            marked = [k in (Kind.ANSWER, Kind.CHAIN) for k in line.kinds]
            stop = len(row.ids) - 1
            questions.append(Question(stop - sum(marked), stop, depth[key], hops))
        return questions
