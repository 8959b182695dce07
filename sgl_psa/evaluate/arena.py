"""Evaluation over two tiers: the arena as a fraction of the KV that the evaluated model has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sgl_psa.config import PlacementName, PSAConfig
from sgl_psa.memory.tiered_cache import TieredCache
from sgl_psa.scorers import CacheShape


@dataclass(frozen=True)
class Arena:
    """The device tier of each group of policies.

    Attributes:
        fraction: of all K and V of the pool, 0 to 1.
        placement, pipeline, host_path: as in ``PSAConfig``.
    """

    fraction: float
    placement: PlacementName = "demand"
    pipeline: bool = True
    host_path: str = ""

    def settings(self, config: PSAConfig, shape: CacheShape, dtype: torch.dtype) -> PSAConfig:
        """``config`` with the bytes of the tiers.

        Raises:
            ConfigError: the fraction is too small, or the settings do not go with tiers.
        """
        page_bytes = 2 * shape.page_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        total = shape.num_layers * shape.num_pages * page_bytes
        return replace(
            config,
            device_pool_bytes=round(self.fraction * total),
            host_pool_bytes=total,
            placement=self.placement,
            pipeline=self.pipeline,
            host_path=self.host_path,
        )


def build(config: PSAConfig, shape: CacheShape, dtype: torch.dtype, backend: str) -> TieredCache:
    """The cache of a group whose settings came from :meth:`Arena.settings`."""
    return TieredCache.build(
        config,
        num_layers=shape.num_layers,
        page_size=shape.page_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        backend=backend,
        device=shape.device,
    )
