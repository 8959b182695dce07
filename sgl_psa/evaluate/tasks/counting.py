"""Counting words over the whole context (after RULER, arXiv 2404.06654).

The answer is spread over everything, so these are hard for a method that reads a part.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from sgl_psa.evaluate.example import Example, Query, Turn
from sgl_psa.evaluate.material import ContextTooShort, Material
from sgl_psa.evaluate.text import invented_held_out_words

_RESERVE = 160
_COMMON = 10
#: Times that common and other words come in contexts from so many tokens on.
_TIMES = {4096: (30, 3), 0: (10, 1)}
_FREQUENT, _EXPONENT = 3, 2.0
#: Invented words, and tokens of a context from which on there are more: one for so many tokens.
_INVENTED_WORDS, _TOKENS_PER_WORD = 4000, 12
_FILLED = 0.9

#: A text of so many units, and the words that are asked for.
Listing = tuple[str, tuple[str, ...]]


def common_words(material: Material, length: int, rng: random.Random) -> Example:
    """Ten words come ten times as often as the others."""
    times = next(times for tokens, times in _TIMES.items() if length >= tokens)
    return _example(
        "Below is a numbered list of words. Some of them are in it more often. "
        "Remember those that are in it most often.\n\n",
        _longest(material, length - _RESERVE, partial(_common_listing, times), rng),
        f"What are the {_COMMON} most common words in the list?",
        f" The {_COMMON} most common words are:",
    )


def frequent_words(material: Material, length: int, rng: random.Random) -> Example:
    """Word frequencies fall with the square of the rank; asked for the first three."""
    return _example(
        "Below is a coded text. Keep count of how often each word appears.\n\n",
        _longest(material, length - _RESERVE, _frequent_listing, rng),
        f"What are the {_FREQUENT} most frequent words in the coded text? Ignore the dots.",
        f" The {_FREQUENT} most frequent words are:",
    )


def _example(introduction: str, made: Listing, ask: str, prefix: str) -> Example:
    listing, answers = made
    turn = Turn(ask, answers, 80, prefix=prefix)
    return Example(introduction + listing + "\n", (Query((turn,)),))


def _common_listing(
    times: tuple[int, int], words: list[str], size: int, rng: random.Random
) -> Listing | None:
    drawn = words[: size + _COMMON]
    if len(drawn) < size + _COMMON:
        return None
    shown = drawn[:_COMMON] * times[0] + drawn[_COMMON:] * times[1]
    rng.shuffle(shown)
    listing = "\n".join(f"{i}. {word}" for i, word in enumerate(shown, 1)) + "\n"
    return listing, tuple(drawn[:_COMMON])


def _frequent_listing(words: list[str], size: int, rng: random.Random) -> Listing | None:
    counts = [int(size * n**-_EXPONENT) for n in range(1, len(words) + 1)]
    if counts[_FREQUENT - 1] == counts[_FREQUENT]:
        return None
    shown = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
    rng.shuffle(shown)
    return " ... ".join(shown) + "\n", tuple(words[:_FREQUENT])


def _longest(
    material: Material,
    tokens: int,
    make: Callable[[list[str], int, random.Random], Listing | None],
    rng: random.Random,
) -> Listing:
    """The longest listing that ``tokens`` hold, to 2 % of its size.

    Raises:
        ContextTooShort: there is none, or the words run out before ``_FILLED`` of the tokens.
    """
    invented = invented_held_out_words(max(_INVENTED_WORDS, tokens // _TOKENS_PER_WORD))
    words = sorted({*material.words, *invented})
    rng.shuffle(words)
    state = rng.getstate()
    best: Listing | None = None
    low, high = 0, tokens
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        rng.setstate(state)
        made = make(words, middle, rng)
        if made is not None and material.count(made[0]) <= tokens:
            low, best = middle, made
        else:
            high = middle
    if best is None:
        raise ContextTooShort(f"{tokens} tokens are too few to count words in: ask for more")
    reached = material.count(best[0])
    if reached < _FILLED * tokens:
        raise ContextTooShort(
            f"{len(words)} words to count make no more than {reached + _RESERVE} tokens: "
            f"ask for --lengths up to that, not {tokens + _RESERVE}"
        )
    return best
