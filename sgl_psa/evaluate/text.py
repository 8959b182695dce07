"""Text and words that every Python installation holds, under the PSF licence.

The text is the standard library's source and reference topics, split by topic with a fixed hash:
the held-out side is what the embedded model never saw in training. Words are split the same way.
What a user's own model saw cannot be known here.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_TOPIC_PERMILLE = 20
HELD_OUT_WORD_PERMILLE = 100
_SKIPPED = ("site-packages", "test", "tests", "idlelib", "encodings", "ensurepip", "pydoc_data")
_SHORTEST, _LONGEST = 500, 300_000


def topic_is_held_out(topic: str) -> bool:
    """Whether documents of ``topic`` (a top-level module, or ``topic-NAME``) are held out."""
    return bucket(f"python/{topic}") < HELD_OUT_TOPIC_PERMILLE


def word_is_held_out(word: str) -> bool:
    """Whether ``word`` belongs to the tenth of all words that training keys and values avoid."""
    return bucket(f"held-out-1:{word.lower()}") < HELD_OUT_WORD_PERMILLE


@cache
def held_out_text() -> str:
    """Every held-out document, joined in a fixed order; about 300,000 characters of ASCII."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        skipped = any(part in _SKIPPED for part in parts) or parts[0].startswith("_sysconfigdata")
        if not skipped and topic_is_held_out(Path(parts[0]).stem):
            found.append(path.read_text(encoding="utf-8", errors="ignore"))
    found += [topics[name] for name in sorted(topics) if topic_is_held_out(f"topic-{name}")]
    cleaned = [clean(text) for text in found]
    return "\n\n".join(text for text in cleaned if _SHORTEST < len(text) < _LONGEST)


@cache
def prose() -> str:
    """Every reference topic of Python, held out or not: English of about 600,000 characters."""
    return "\n\n".join(clean(topics[name]) for name in sorted(topics))


@cache
def held_out_words() -> tuple[str, ...]:
    """Sorted lower-case held-out words of 4 to 9 letters that occur in the text."""
    found = set(re.findall(r"\b[a-z]{4,9}\b", prose() + held_out_text()))
    return tuple(sorted(word for word in found if word_is_held_out(word)))


@cache
def words() -> tuple[str, ...]:
    """Sorted lower-case words of 4 to 9 letters of the reference topics."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,9}\b", prose()))))


def bucket(name: str) -> int:
    """0 to 999, by a fixed hash: what decides every held-out split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000


def clean(text: str) -> str:
    """ASCII with unix newlines, no long rulers, no runs of blank lines."""
    text = text.replace("\r\n", "\n").replace("\t", "    ").encode("ascii", "ignore").decode()
    text = re.sub(r" +\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"([-=#*~_.^+])\1{7,}", lambda match: match.group(1) * 6, text)
    return re.sub(r" {9,}", " " * 8, text)


_PARTS = """
b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sp st th tr
a e i o u ai ea ee oa ou
- - b ck d g l m n nd p r s st t
"""


@cache
def invented_held_out_words(count: int) -> tuple[str, ...]:
    """``count`` pronounceable held-out words of two syllables; the same on every machine."""
    onsets, nuclei, codas = (
        ["" if part == "-" else part for part in line.split()]
        for line in _PARTS.strip().splitlines()
    )
    rng = random.Random(count)
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas) for _ in "12")
        if word_is_held_out(word):
            found[word] = None
    return tuple(found)
