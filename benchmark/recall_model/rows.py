"""Training rows: ordinary text, set lines and queries mixed in several ways, and position jumps.

Values at set lines are unpredictable and carry no loss; the loss counts text tokens, answers and
the newline after an answer.  Position jumps (after PoSE, Zhu et al. 2023) add gaps at line
starts, so that short rows show the model the relative distances of long ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .lexicon import Word
from .lines import STYLES, Key, Kind, Line, Store
from .prepare import Data
from .tokenizer import BOS_ID


@dataclass(frozen=True)
class Mix:
    """Shares of row types and line types in one curriculum stage.

    text, needle: of all rows; dense: of the other rows those without text; chain: of set lines in
    rows that have chains; styled, hard: of rows with separators, with colliding keys; jump: of
    rows with position jumps, which reach up to max_position.
    """

    text: float
    needle: float
    dense: float
    chain: float
    styled: float = 0.0
    hard: float = 0.5
    max_position: int = 512
    jump: float = 0.3


@dataclass
class Row:
    """Token ids, their kinds, and the starts of lines and text pieces."""

    length: int
    ids: list[int] = field(default_factory=lambda: [BOS_ID])
    kinds: list[Kind] = field(default_factory=lambda: [Kind.IGNORED])
    starts: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.length - len(self.ids)

    def put(self, line: Line, newline: int) -> None:
        """Append a line; its leading newline merges with one that is already there."""
        self.starts.append(len(self.ids))
        skip = int(self.ids[-1] == newline and line.ids[0] == newline)
        self.ids += line.ids[skip:]
        self.kinds += line.kinds[skip:]

    def put_text(self, stream: np.ndarray, count: int, rng: random.Random, newline: int) -> None:
        """Append a random piece of the text stream on a new line."""
        start = rng.randrange(len(stream) - count)
        piece = stream[start : start + count].tolist()
        first = [] if self.ids[-1] == newline else [newline]
        self.starts.append(len(self.ids))
        self.ids += first + piece
        self.kinds += [Kind.IGNORED] * (len(first) + 1) + [Kind.TEXT] * (count - 1)


class RowMaker:
    """Makes one row at a time from a random generator."""

    def __init__(self, data: Data, rng: random.Random, mix: Mix, length: int) -> None:
        self.data, self.rng, self.mix, self.length = data, rng, mix, length
        self.newline = data.lexicon.symbols["\n"][0]

    def make(self) -> Row:
        choice = self.rng.random()
        if choice < self.mix.text:
            return self._text_row()
        if choice < self.mix.text + self.mix.needle:
            return self._needle_row()
        return self._mixed_row(
            0.0 if self.rng.random() < self.mix.dense else self.rng.uniform(0.2, 0.9)
        )

    def _store(self) -> Store:
        lexicon, rng, mix = self.data.lexicon, self.rng, self.mix
        draw: Callable[[], Word] = lambda: lexicon.open_word(rng)  # noqa: E731
        if rng.random() < mix.hard:
            pool = lexicon.hard_pool(rng)
            draw = lambda: rng.choice(pool)  # noqa: E731
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        return Store(rng, lexicon, draw, style=style if rng.random() < mix.styled else "")

    def _chain_share(self, store: Store) -> float:
        allowed = not store.style and self.rng.random() < 0.7
        return self.mix.chain if allowed else 0.0

    def _ask(self, row: Row, store: Store, key: Key) -> None:
        if store.entries[key].hops and self.rng.random() < 0.85:
            row.put(store.chain_line(key), self.newline)
        else:
            row.put(store.query_line(key, self.rng.random() < 0.8), self.newline)

    def _text_row(self) -> Row:
        stream, row = self.data.train, Row(self.length)
        start = self.rng.randrange(len(stream) - self.length)
        row.ids += stream[start : start + self.length - 1].tolist()
        row.kinds += [Kind.TEXT] * (self.length - 1)
        row.starts = sorted(self.rng.sample(range(1, self.length), 4))
        return row

    def _needle_row(self) -> Row:
        """One to eight set lines in text, and their queries at the end."""
        row, store, rng = Row(self.length), self._store(), self.rng
        chain, count = self._chain_share(store), rng.randint(1, 8)
        body = max(0, self.length - count * 26 - 20)
        done = 0
        for cut in sorted(rng.randrange(body + 1) for _ in range(count)):
            if cut - done > 3:
                row.put_text(self.data.train, cut - done, rng, self.newline)
                done = cut
            row.put(store.set_line(chain)[1], self.newline)
        if body - done > 3:
            row.put_text(self.data.train, body - done, rng, self.newline)
        keys = list(store.entries)
        rng.shuffle(keys)
        while row.room > 0:
            for key in keys:
                self._ask(row, store, key)
        return row

    def _mixed_row(self, text_share: float) -> Row:
        """Set lines and queries everywhere, with text_share of the tokens ordinary text."""
        row, store, rng = Row(self.length), self._store(), self.rng
        chain, asking = self._chain_share(store), rng.uniform(0.3, 0.75)
        text_tokens, keys = 0, list[Key]()
        while row.room > 0:
            if text_tokens < text_share * len(row.ids):
                count = rng.randint(8, 96)
                row.put_text(self.data.train, count, rng, self.newline)
                text_tokens += count
            elif keys and rng.random() < asking:
                self._ask(row, store, rng.choice(keys))
            else:
                key, line = store.set_line(chain)
                keys.append(key)
                row.put(line, self.newline)
        return row


def positions(row: Row, rng: random.Random, mix: Mix) -> np.ndarray:
    """int64 [length] position ids; with jumps they reach up to mix.max_position."""
    result = np.arange(row.length)
    extra = mix.max_position - row.length
    starts = [s for s in row.starts if s < row.length]
    if starts and extra > 0 and rng.random() < mix.jump:
        total = rng.randrange(extra)
        for start in rng.sample(starts, min(rng.randint(1, 3), len(starts))):
            step = rng.randint(0, total)
            result[start:] += step
            total -= step
    return result
