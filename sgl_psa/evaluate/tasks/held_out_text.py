"""Perplexity of held-out text: spans near the end of a window, fed token by token."""

from __future__ import annotations

import random

from sgl_psa.evaluate.example import TextExample
from sgl_psa.evaluate.material import ContextTooShort, Material

_SPANS = 20
_SPAN_TOKENS = 24


def build(material: Material, length: int, rng: random.Random) -> TextExample:
    """A window of ``length`` tokens; its last quarter, at most, is predicted in short spans.

    Each span is decoded on its own from the dense prefill of what stands before it.
    """
    ids, bos = material.text_ids, material.tokenizer.bos_token_id
    first = [] if bos is None else [bos]
    room = length - len(first)
    if room >= len(ids):
        raise ContextTooShort(f"the held-out text has {len(ids)} tokens: ask for a length below")
    start = rng.randrange(len(ids) - room)
    window = tuple(first + ids[start : start + room])
    spans = min(_SPANS, max(1, length // 4 // _SPAN_TOKENS))
    begin = length - spans * _SPAN_TOKENS
    places = [begin + i * _SPAN_TOKENS for i in range(spans)]
    return TextExample(window, tuple((place, place + _SPAN_TOKENS) for place in places))
