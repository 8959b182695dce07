"""What a placement is: an order of victims, and a most that a layer may hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from sgl_psa_kernels.page_tier import TierShape, TierTables

#: Bits below the stamp for the running number ``came``, which orders frames of one stamp.
_CAME_BITS = 32


class Placement(ABC):
    """Chooses the frames that the tier may take in the coming step.

    It reads the tier's tables between steps only; frames that are ``busy`` or free are no victims.
    """

    name: ClassVar[str]

    def __init__(self, shape: TierShape) -> None:
        """
        Raises:
            ConfigError: the device tier is too small for this placement.
        """
        self.shape = shape

    @property
    def quota(self) -> int:
        """Frames that a layer may hold; all of them unless the placement divides them."""
        return self.shape.num_frames

    @abstractmethod
    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        """Frames in the order in which they may be taken, int32 [Q, count], -1 where there are no
        more. Layer l takes from row l % Q: Q is 1, or the number of layers."""

    def age(self, tables: TierTables, step: int) -> None:
        """Step ``step`` begins; may lower ``tables.uses``."""
        return


def last_attended(tables: TierTables, frames: np.ndarray) -> np.ndarray:
    """Sort key int64 of used frames: the step that attended their page last, then the order in
    which they were filled."""
    owner = tables.owner.numpy()[frames]
    stamp = tables.stamp.numpy().reshape(-1)[owner].astype(np.int64)
    came = tables.came.numpy()[frames]
    tail = came - came.min(initial=0)
    return (stamp << _CAME_BITS) + np.minimum(tail, (1 << _CAME_BITS) - 1)


def candidates(tables: TierTables) -> np.ndarray:
    """Frames that may be taken, int64 [n]."""
    return np.flatnonzero((tables.owner.numpy() >= 0) & (tables.busy.numpy() == 0))


def lowest(key: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` lowest of ``key`` in ascending order; fewer if there are fewer."""
    if count < len(key):
        chosen = np.argpartition(key, count)[:count]
        return chosen[np.argsort(key[chosen])]
    return np.argsort(key)


def padded(frames: np.ndarray, count: int) -> np.ndarray:
    """``frames`` as int32 [count], -1 behind the last."""
    order = np.full(count, -1, dtype=np.int32)
    order[: len(frames)] = frames
    return order
