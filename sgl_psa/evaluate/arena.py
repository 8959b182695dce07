"""Evaluation over two tiers: the arena as a fraction of the KV that the evaluated model has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sgl_psa.config import HostDtypeName, PlacementName, PSAConfig
from sgl_psa.memory.sizes import tier_shape
from sgl_psa.memory.tiered_cache import TieredCache
from sgl_psa.scorers import CacheShape


@dataclass(frozen=True)
class Arena:
    """The device tier of each group of policies.

    Attributes:
        fraction: of all K and V of the pool, 0 to 1.
        placement, pipeline, host_path, host_dtype: as in ``PSAConfig``.
    """

    fraction: float
    placement: PlacementName = "demand"
    pipeline: bool = True
    host_path: str = ""
    host_dtype: HostDtypeName = "auto"

    def settings(self, config: PSAConfig, shape: CacheShape, dtype: torch.dtype) -> PSAConfig:
        """``config`` with the bytes of the tiers.

        Raises:
            ConfigError: the fraction is too small, or the settings do not go with tiers.
        """
        page = tier_shape(self.host_dtype, **_kv(shape, dtype))
        records = shape.num_layers * shape.num_pages
        return replace(
            config,
            device_pool_bytes=round(self.fraction * records * page.frame_bytes),
            host_pool_bytes=records * page.record_bytes,
            placement=self.placement,
            pipeline=self.pipeline,
            host_path=self.host_path,
            host_dtype=self.host_dtype,
        )


def build(config: PSAConfig, shape: CacheShape, dtype: torch.dtype, backend: str) -> TieredCache:
    """The cache of a group whose settings came from :meth:`Arena.settings`."""
    return TieredCache.build(config, **_kv(shape, dtype), backend=backend, device=shape.device)


def _kv(shape: CacheShape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_layers": shape.num_layers,
        "page_size": shape.page_size,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "dtype": dtype,
    }
