"""Everything that is computed once before training: tokenizer, text streams, lexicon.

Data folder layout: tokenizer.json, words.txt (the dictionary, held-out words included),
text_train.npy and text_val.npy (uint16 token streams, documents separated by BOS).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sgl_psa.evaluate.text import word_is_held_out

from . import tokenizer as tok
from .corpus import Document, collect
from .lexicon import Lexicon
from .words import dictionary

_REPEATS = {"python": 1, "cmake": 2, "node": 1, "rust": 2}
_TOKENIZER_SHARE = {"python": 0.35, "cmake": 0.8, "node": 0.6, "rust": 1.0}


@dataclass(frozen=True)
class Data:
    """Tokenizer, lexicon and the two text streams (uint16 [tokens])."""

    tokenizer: Tokenizer
    lexicon: Lexicon
    train: np.ndarray
    validation: np.ndarray


def _stream(tokenizer: Tokenizer, documents: list[Document], rng: random.Random) -> np.ndarray:
    encoded = [
        [tok.BOS_ID, *e.ids]
        for e in tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    ]
    repeated = [
        ids
        for d, ids in zip(documents, encoded, strict=True)
        for _ in range(1 if d.is_validation else _REPEATS[d.source])
    ]
    rng.shuffle(repeated)
    return np.array([i for ids in repeated for i in ids], dtype=np.uint16)


def prepare(folder: Path, tokenizer_file: Path | None = None) -> Data:
    """Load the data folder, building what is missing.

    tokenizer_file: use this tokenizer instead of training one (the folder then belongs to it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, streams = folder / "tokenizer.json", [folder / f"text_{s}.npy" for s in ("train", "val")]
    word_file = folder / "words.txt"
    if not all(path.exists() for path in (own, word_file, *streams)):
        rng = random.Random(0)
        documents = collect()
        training = [d for d in documents if not d.is_validation]
        words = dictionary(d.text for d in training)
        word_file.write_text("\n".join(words))
        if tokenizer_file is None:
            texts = [d.text[:60_000] for d in training if rng.random() < _TOKENIZER_SHARE[d.source]]
            tokenizer = tok.build(texts, [w for w in words if not word_is_held_out(w)])
        else:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        validation = [d for d in documents if d.is_validation]
        for path, part in zip(streams, (training, validation), strict=True):
            np.save(path, _stream(tokenizer, part, rng))
        tokenizer.save(str(own))
    tokenizer = Tokenizer.from_file(str(own))
    train, validation_stream = (np.load(s, mmap_mode="r") for s in streams)
    lexicon = Lexicon.build(tokenizer, word_file.read_text().split("\n"))
    return Data(tokenizer, lexicon, train, validation_stream)
