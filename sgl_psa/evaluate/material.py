"""Building blocks of contexts: counted filler, keys, and lines woven into the filler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sgl_psa.evaluate import text

RECALL, PLAIN = "recall", "plain"
STYLES = (RECALL, PLAIN)
#: First characters that have a meaning in the line language of the embedded model.
MARKS = "#?>"
_INVENTED_WORDS = 1500


class ContextTooShort(ValueError):
    """The asked length has no room for what the task needs."""


class Material:
    """Text, words and token counts for one tokenizer and prompt style."""

    def __init__(self, tokenizer: Any, style: str) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer; it decides how long a context is.
            style: ``recall``, the line language of the embedded model, or ``plain`` English.
        """
        self.tokenizer = tokenizer
        self.style = style
        if style == RECALL:
            self.words = text.held_out_words() + text.invented_held_out_words(_INVENTED_WORDS)
        else:
            self.words = text.words()

    def encode(self, string: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids

    def count(self, string: str) -> int:
        """Tokens of ``string`` without special tokens."""
        return len(self.encode(string))

    @cached_property
    def filler(self) -> list[tuple[str, int]]:
        """Lines of held-out text with their tokens; none begins with a mark."""
        lines = [
            line for line in text.held_out_text().splitlines() if line.lstrip()[:1] not in MARKS
        ]
        lines = [line for line in lines if line.strip()]
        ids = self.tokenizer([line + "\n" for line in lines], add_special_tokens=False).input_ids
        return [(line, len(tokens)) for line, tokens in zip(lines, ids, strict=True)]

    @cached_property
    def text_ids(self) -> list[int]:
        """Token ids of the whole held-out text."""
        return self.encode(text.held_out_text())

    def weave(self, lines: Sequence[str], tokens: int, rng: random.Random) -> str:
        """``lines`` in their order, at random places of filler; at most ``tokens`` tokens in all.

        Raises:
            ContextTooShort: the lines alone are longer.
        """
        used = sum(self.count(line + "\n") for line in lines)
        if used > tokens:
            raise ContextTooShort(f"{used} tokens of lines do not fit into {tokens}: ask for more")
        start, around, at = rng.randrange(len(self.filler)), list[str](), 0
        free = tokens - used
        while True:
            line, size = self.filler[(start + at) % len(self.filler)]
            if size > free:
                break
            around.append(line)
            free -= size
            at += 1
        places = sorted(rng.randrange(len(around) + 1) for _ in lines)
        while True:
            woven = _insert(lines, places, around)
            if self.count(woven) <= tokens:
                return woven
            around.pop()
            places = [min(place, len(around)) for place in places]


def _insert(lines: Sequence[str], places: Sequence[int], around: Sequence[str]) -> str:
    woven, done = list[str](), 0
    for line, place in zip(lines, places, strict=True):
        woven += [*around[done:place], line]
        done = place
    return "\n".join([*woven, *around[done:]]) + "\n"


class Keys:
    """Fresh keys of one or two words; no key of a context is the beginning of another."""

    def __init__(self, words: Sequence[str], rng: random.Random) -> None:
        self._words = words
        self._rng = rng
        self._singles: set[str] = set()
        self._firsts: set[str] = set()
        self._pairs: set[tuple[str, str]] = set()

    def draw(self) -> str:
        """One more key."""
        for _ in range(1000):
            first, second = self._rng.sample(self._words, 2)
            if first in self._singles:
                continue
            if self._rng.random() < 0.3 and first not in self._firsts:
                self._singles.add(first)
                return first
            if (first, second) not in self._pairs:
                self._firsts.add(first)
                self._pairs.add((first, second))
                return f"{first} {second}"
        raise ContextTooShort(f"{len(self._words)} words do not make more keys")


def number(rng: random.Random) -> str:
    """Six digits."""
    return f"{rng.randrange(10**6):06d}"
