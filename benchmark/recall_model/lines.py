"""The lines of the recall language.

    # green apple482915      set: key words, then the value (3 or 6 digits, or words)
    ? green apple482915      query: repeats the start of a set line; the model completes it
    # blue sky green apple   a value may be another key
    > blue sky green apple482915   chain query: the model follows keys until a plain value

A `?` line repeats the beginning of an earlier `#` line and the model writes the rest, so the
key ends where the query ends.  Keys of one context are prefix-free as token sequences, which
makes every query unambiguous.  A row may put a separator between key and value (see STYLES).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from .lexicon import Lexicon, Word

Key = tuple[int, ...]
# Separator of key and value, and its share among rows that allow separators.
STYLES = {":": 0.5, " =": 0.2, " is": 0.15, " ": 0.15}

MAX_HOPS = 4


class Kind(IntEnum):
    """What a token is to the loss."""

    IGNORED = 0
    TEXT = 1
    ANSWER = 2
    CHAIN = 3
    STOP = 4


@dataclass
class Line:
    """Token ids with one Kind each."""

    ids: list[int]
    kinds: list[Kind]

    @classmethod
    def of(cls, *parts: tuple[list[int], Kind]) -> Line:
        return cls([i for ids, _ in parts for i in ids], [k for ids, k in parts for _ in ids])


@dataclass
class Entry:
    """A key's value: tokens, hops to a plain value, and whether it starts with digits."""

    value: list[int]
    hops: int
    is_number: bool
    is_words: bool


@dataclass
class Store:
    """Keys and values of one context."""

    rng: random.Random
    lexicon: Lexicon
    draw_word: Callable[[], Word]
    word_counts: tuple[float, float, float] = (0.3, 0.58, 0.12)
    style: str = ""
    entries: dict[Key, Entry] = field(default_factory=dict)
    _prefixes: set[Key] = field(default_factory=set)

    def _new_key(self) -> Key:
        for attempt in range(100):
            words = self.rng.choices((1, 2, 3), self.word_counts)[0] + attempt // 30
            draw = self.draw_word if attempt < 60 else lambda: self.lexicon.open_word(self.rng)
            key = tuple(i for _ in range(words) for i in draw())
            starts = [key[:n] for n in range(1, len(key))]
            if key in self.entries or key in self._prefixes:
                continue
            if any(start in self.entries for start in starts):
                continue
            self._prefixes.update(starts)
            return key
        raise RuntimeError("no free key in this context")

    def _new_entry(self, chain_share: float, word_share: float) -> Entry:
        rng = self.rng
        if rng.random() < chain_share:
            targets = [
                k
                for k in list(self.entries)[-40:]
                if self.entries[k].hops < MAX_HOPS and not self.entries[k].is_words
            ]
            if targets:
                target = rng.choice(targets)
                return Entry(list(target), self.entries[target].hops + 1, False, False)
        if rng.random() < word_share:
            words = [i for _ in range(rng.randint(1, 2)) for i in self.lexicon.open_word(rng)]
            return Entry(words, 0, False, True)
        groups = 2 if rng.random() < 0.8 else 1
        return Entry([rng.choice(self.lexicon.numbers) for _ in range(groups)], 0, True, False)

    def _separator(self, entry: Entry) -> tuple[list[int], list[int]]:
        """(symbol, gap): the visible separator and the space before a number after it."""
        if not self.style:
            return [], []
        space = self.lexicon.symbols[" "]
        symbol = [] if self.style == " " else self.lexicon.symbols[self.style]
        return symbol, (space if entry.is_number else [])

    def set_line(self, chain_share: float = 0.0, word_share: float = 0.2) -> tuple[Key, Line]:
        """A fresh key and the line that sets it."""
        key = self._new_key()
        entry = self._new_entry(chain_share, word_share)
        self.entries[key] = entry
        symbol, gap = self._separator(entry)
        symbols = self.lexicon.symbols
        ids = [*symbols["\n"], *symbols["#"], *key, *symbol, *gap, *entry.value]
        return key, Line.of((ids, Kind.IGNORED))

    def query_line(self, key: Key, with_separator: bool = True) -> Line:
        """`?` line; the separator belongs to the question or to the answer."""
        entry, symbols = self.entries[key], self.lexicon.symbols
        symbol, gap = self._separator(entry)
        head = [*symbols["\n"], *symbols["?"], *key]
        if with_separator:
            head, symbol = [*head, *symbol], []
        answer = [*symbol, *gap, *entry.value]
        return Line.of((head, Kind.IGNORED), (answer, Kind.ANSWER), (symbols["\n"], Kind.STOP))

    def chain_line(self, key: Key) -> Line:
        """`>` line: every key on the way, then the plain value (no separators)."""
        symbols, answer, at = self.lexicon.symbols, list[int](), key
        while self.entries[at].hops > 0:
            at = tuple(self.entries[at].value)
            answer += at
        answer += self.entries[at].value
        head = [*symbols["\n"], *symbols[">"], *key]
        return Line.of((head, Kind.IGNORED), (answer, Kind.CHAIN), (symbols["\n"], Kind.STOP))
