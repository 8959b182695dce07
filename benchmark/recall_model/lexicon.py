"""Words as token sequences, and the pools that keys are drawn from.

A word is the tuple of token ids of " word" (with its leading space).  Hard pools make keys
collide: few words, or words that share their first tokens or their last tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from sgl_psa.evaluate.text import word_is_held_out

from .words import invented

Word = tuple[int, ...]
INVENTED_WORDS = 30_000
CAPITAL_WORDS = 15_000
MAX_WORD_TOKENS = 6


def encode_words(tokenizer: Tokenizer, words: list[str]) -> list[Word]:
    encoded = tokenizer.encode_batch([" " + w for w in words], add_special_tokens=False)
    return [tuple(e.ids) for e in encoded if len(e.ids) <= MAX_WORD_TOKENS]


@dataclass(frozen=True)
class Lexicon:
    """Word lists of token tuples; `held_out` is for evaluation only."""

    known: list[Word]
    held_out: list[Word]
    common: list[Word]
    invented: list[Word]
    capital: list[Word]
    by_prefix: list[Word]
    by_suffix: list[Word]
    numbers: list[int]
    symbols: dict[str, list[int]]

    @classmethod
    def build(cls, tokenizer: Tokenizer, words: list[str]) -> Lexicon:
        """words: the dictionary; its held-out tenth is separated here."""
        in_list = [w for w in words if not word_is_held_out(w)]
        known = encode_words(tokenizer, in_list)
        capital = random.Random(1).sample(in_list, min(CAPITAL_WORDS, len(in_list)))
        symbols = ("\n", "#", "?", ">", " ", ":", " =", " is")
        return cls(
            known=known,
            held_out=encode_words(tokenizer, [w for w in words if word_is_held_out(w)]),
            common=[w for w in known if len(w) == 1],
            invented=encode_words(tokenizer, invented(INVENTED_WORDS, seed=2)),
            capital=encode_words(tokenizer, [w.capitalize() for w in capital]),
            by_prefix=sorted(known),
            by_suffix=sorted(known, key=lambda w: w[::-1]),
            numbers=[tokenizer.token_to_id(f"{n:03d}") for n in range(1000)],
            symbols={s: tokenizer.encode(s, add_special_tokens=False).ids for s in symbols},
        )

    def open_word(self, rng: random.Random) -> Word:
        """A word of the whole training vocabulary: common, dictionary, invented, capitalised."""
        choice = rng.random()
        if choice < 0.30:
            return rng.choice(self.common)
        if choice < 0.75:
            return rng.choice(self.known)
        return rng.choice(self.invented if choice < 0.92 else self.capital)

    def hard_pool(self, rng: random.Random) -> list[Word]:
        """24 to 300 words in which collisions are frequent."""
        size = int(24 * (300 / 24) ** rng.random())
        choice = rng.random()
        if choice < 0.4:
            return [self.open_word(rng) for _ in range(size)]
        ordered = self.by_prefix if choice < 0.7 else self.by_suffix
        start = rng.randrange(max(1, len(ordered) - size))
        return ordered[start : start + size]
