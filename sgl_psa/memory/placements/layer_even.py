"""Equal shares of the frames for every layer, least recently used within: the baseline.

This is how caches of sparse attention with offload were divided before one pool served all layers
(ArkVale, InfLLM); layers of flat attention load again and again what others have no use for.
"""

from __future__ import annotations

import numpy as np
import torch
from sgl_psa_kernels.page_tier import TierShape, TierTables

from sgl_psa.config import ConfigError
from sgl_psa.memory.placements.base import Placement, candidates, least_recent, padded


class LayerEven(Placement):
    """A layer never holds more than its share, and takes from itself only."""

    name = "even"

    def __init__(self, shape: TierShape) -> None:
        super().__init__(shape)
        if self.quota < shape.minimum_frames:
            least = shape.num_layers * shape.minimum_frames * shape.frame_bytes
            raise ConfigError(
                f"placement='even' leaves {self.quota} of {shape.num_frames} frames to each of "
                f"{shape.num_layers} layers, which need {shape.minimum_frames}; set "
                f"device_pool_bytes to {least} or more, or placement to demand"
            )

    @property
    def quota(self) -> int:
        return self.shape.num_frames // self.shape.num_layers

    def victims(self, tables: TierTables, count: int) -> torch.Tensor:
        layers = self.shape.num_layers
        frames = candidates(tables)
        layer = (tables.owner.numpy()[frames] // self.shape.num_pages).astype(np.uint16)
        # The stable sort of 16-bit keys is a radix sort: linear in the frames.
        by_layer = np.argsort(layer, kind="stable")
        frames = frames[by_layer]
        ends = np.cumsum(np.bincount(layer, minlength=layers))
        width = min(count, self.quota)
        rows = [
            padded(least_recent(tables, mine, width), width) for mine in np.split(frames, ends[:-1])
        ]
        return torch.from_numpy(np.stack(rows))
