"""Batches of training rows, made ahead by a thread; batch number n depends on (seed, n) only."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import dataclass

import numpy as np
import torch

from .curriculum import Stage
from .prepare import Data
from .rows import RowMaker, positions

# Loss weight by Kind: ignored, text, answer, chain answer, newline after an answer.
WEIGHTS = np.array([0.0, 1.0, 5.0, 5.0, 2.0], dtype=np.float32)


@dataclass
class Batch:
    """ids and positions are int64 [rows, length]; the rest is [selected].

    Only `selected` = tokens / 2 places enter the loss: every answer, then random text.
    place: flat index of the predicting token; target: its next token; weight, kind: of the target.
    """

    number: int
    length: int
    ids: torch.Tensor
    positions: torch.Tensor
    place: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    kind: np.ndarray


def make_batch(data: Data, stage: Stage, seed: int, number: int) -> Batch:
    rng = random.Random(seed * 1_000_003 + number)
    rows = stage.batch_tokens // stage.length
    maker = RowMaker(data, rng, stage.mix, stage.length + 1)
    ids = np.zeros((rows, stage.length + 1), np.int64)
    kinds = np.zeros((rows, stage.length + 1), np.int64)
    places = np.zeros((rows, stage.length), np.int64)
    for i in range(rows):
        row = maker.make()
        ids[i] = row.ids[: stage.length + 1]
        kinds[i] = row.kinds[: stage.length + 1]
        places[i] = positions(row, rng, stage.mix)[: stage.length]
    kind = kinds[:, 1:].reshape(-1)
    shuffled = np.random.default_rng((seed, number)).permutation(kind.size)
    priority = np.array([2, 1, 0, 0, 0])[kind[shuffled]]
    chosen = shuffled[np.argsort(priority, kind="stable")[: kind.size // 2]]
    return Batch(
        number,
        stage.length,
        torch.from_numpy(ids[:, :-1].copy()),
        torch.from_numpy(places),
        torch.from_numpy(chosen),
        torch.from_numpy(ids[:, 1:].reshape(-1)[chosen]),
        torch.from_numpy(WEIGHTS[kind[chosen]]),
        kind[chosen],
    )


class BatchQueue:
    """Makes batches first, first + 1, ... of one stage in the background until closed."""

    def __init__(self, data: Data, stage: Stage, seed: int, first: int) -> None:
        self._queue: queue.Queue[Batch] = queue.Queue(3)
        self._closed = threading.Event()
        self._arguments = (data, stage, seed)
        self._thread = threading.Thread(target=self._run, args=(first,), daemon=True)
        self._thread.start()

    def _run(self, number: int) -> None:
        while not self._closed.is_set():
            batch = make_batch(*self._arguments, number)
            number += 1
            while not self._closed.is_set():
                try:
                    self._queue.put(batch, timeout=0.5)
                    break
                except queue.Full:
                    continue

    def get(self) -> Batch:
        while self._thread.is_alive():
            try:
                return self._queue.get(timeout=5)
            except queue.Empty:
                continue
        raise RuntimeError("the batch thread has stopped")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
