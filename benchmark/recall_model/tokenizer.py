"""A 6144-token byte-level BPE in which 000 to 999 are single tokens and newline stands alone.

Numbers are cut into groups of at most three digits from the left, so a six-digit value is two
tokens.  Every word after a space is encoded by itself, so a key has the same tokens wherever
it occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 6144
BOS, EOS, PAD, RESERVED = "<|bos|>", "<|eos|>", "<|pad|>", "<|reserved|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}"
    "{{ '\\n' }}{% endif %}{{ message['content'] }}{% endfor %}"
)
_NUMBER_TOKENS = 1100
_WORD_WEIGHT = 4
_PATTERN = r"\n| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
_DIGITS = "0123456789"


def _add_numbers(description: dict) -> None:
    """Append the merges that make every group of two or three digits one token."""
    vocabulary, merges = description["model"]["vocab"], description["model"]["merges"]

    def add(left: str, right: str) -> None:
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append([left, right])

    for pair in product(_DIGITS, repeat=2):
        add(*pair)
    for first, second, third in product(_DIGITS, repeat=3):
        add(first + second, third)
        add(first, second + third)


def build(texts: Iterable[str], words: list[str]) -> Tokenizer:
    """Train on the texts and on the words (after a space, weighted against technical text)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    spaced = [re.sub(r"\d{2,}", lambda m: " ".join(m.group(0)), text) for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - _NUMBER_TOKENS,
        special_tokens=[BOS, EOS, PAD, RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=14,
    )
    tokenizer.train_from_iterator([*spaced, (" " + " ".join(words)) * _WORD_WEIGHT], trainer)
    description = json.loads(tokenizer.to_str())
    _add_numbers(description)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"corpus too small: {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without the leading BOS."""
    return tokenizer.encode(text, add_special_tokens=False).ids
