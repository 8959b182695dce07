"""Long prompts with something to find in them: documentation text with recall lines strewn in.

A recall line is ``# green apple: 482915``; the prompt ends with the query ``? green apple:``. The
text is the documentation of Python's standard library, so no file has to be shipped or fetched.
"""

from __future__ import annotations

import importlib
import inspect
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

MODULES = [
    "argparse",
    "collections",
    "configparser",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "inspect",
    "itertools",
    "json",
    "logging",
    "optparse",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "unittest",
    "urllib.parse",
    "zipfile",
]
ADJECTIVES = [
    "blue",
    "green",
    "quiet",
    "rapid",
    "golden",
    "frozen",
    "hollow",
    "bitter",
    "silver",
    "narrow",
    "gentle",
    "wooden",
]
NOUNS = [
    "harbor",
    "apple",
    "mirror",
    "engine",
    "garden",
    "letter",
    "bridge",
    "candle",
    "window",
    "forest",
    "basket",
    "signal",
]


@dataclass(frozen=True)
class Recall:
    """A prompt and the number that its last line asks for."""

    ids: list[int]
    text: str
    answer: str


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of documentation, in a fixed order."""
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        members = [getattr(module, key) for key in sorted(getattr(module, "__all__", ()))]
        for item in [module, *members]:
            doc = inspect.getdoc(item) if callable(item) or inspect.ismodule(item) else None
            for block in (doc or "").split("\n\n"):
                block = " ".join(block.split())
                if len(block) > 120:
                    found[block] = None
    return tuple(found)


class Prompts:
    """Prompts in the vocabulary of one model.

    The same seed gives the same prompt; different seeds differ from the first token on.
    """

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(ids))

    def filler(self, tokens: int, seed: int) -> list[int]:
        """Exactly ``tokens`` token ids of documentation text."""
        rng = random.Random(seed)
        ids = self.ids(f"Notes {seed}.")
        while len(ids) < tokens:
            ids += self.ids("\n" + rng.choice(paragraphs()))
        return ids[:tokens]

    def context(self, tokens: int, seed: int, facts: int = 12) -> tuple[list[int], dict[str, str]]:
        """``tokens`` token ids of text with recall lines at even distances; keys and values."""
        rng = random.Random(seed)
        names = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
        values = {k: str(rng.randrange(100000, 1000000)) for k in rng.sample(names, facts)}
        lines = [self.ids(f"\n# {key}: {value}") for key, value in values.items()]
        filler = self.filler(tokens - sum(map(len, lines)), seed)
        step = len(filler) // facts
        ids = []
        for index, line in enumerate(lines):
            ids += filler[index * step : (index + 1) * step if index < facts - 1 else None]
            ids += line
        return ids, values

    def ask(self, context: list[int], key: str, value: str) -> Recall:
        """``context`` followed by the query for ``key``."""
        ids = context + self.ids(f"\n? {key}:")
        return Recall(ids, self.text(ids), value)

    def recall(self, tokens: int, seed: int) -> Recall:
        """A prompt of exactly ``tokens`` token ids that asks for an early line."""
        query = 12
        context, values = self.context(tokens - query, seed)
        key = list(values)[2]
        asked = self.ask(context, key, values[key])
        pad = self.filler(tokens - len(asked.ids), seed + 1) if len(asked.ids) < tokens else []
        return self.ask(pad + context, key, values[key])
