"""The open vocabulary of keys and word values: dictionary words and invented words.

The dictionary is SCOWL as packaged by distributions under /usr/share/dict; without it the
words are harvested from the corpus.  A seeded hash holds out one word in ten: held-out words
never take part in a training key or value (they may occur in ordinary text).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sgl_psa.evaluate.text import word_is_held_out

WORD_LISTS = ("/usr/share/dict/american-english", "/usr/share/dict/words")
_PARTS = """
b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kl pl pr qu sc sh sk sl sp st th tr
a e i o u ai ea ee io oa ou y
- - - b ck d g l m n nd nk p r rn s st t x
"""
_ONSETS, _NUCLEI, _CODAS = (
    ["" if part == "-" else part for part in line.split()] for line in _PARTS.split("\n")[1:4]
)


def dictionary(fallback_texts: Iterable[str] = ()) -> list[str]:
    """Sorted lower-case words of 3 to 14 letters."""
    for name in WORD_LISTS:
        if Path(name).is_file():
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            return sorted({w for w in lines if re.fullmatch(r"[a-z]{3,14}", w)})
    print("words: no word list found, harvesting the corpus", flush=True)
    counts: Counter[str] = Counter()
    for text in fallback_texts:
        counts.update(re.findall(r"\b[a-z]{3,14}\b", text))
    return sorted(word for word, count in counts.items() if count >= 2)


def invented(count: int, seed: int) -> list[str]:
    """Pronounceable words of one to four syllables that no dictionary needs to hold."""
    rng = random.Random(seed)
    words: set[str] = set()
    while len(words) < count:
        syllables = rng.choices((1, 2, 3, 4), (1, 4, 3, 1))[0]
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables)
        )
        if len(word) >= 3 and not word_is_held_out(word):
            words.add(word)
    return sorted(words)
