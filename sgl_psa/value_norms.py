"""Largest value norm of each page: how far a page can move the output, for stop rule ``change``."""

from __future__ import annotations

import torch

from sgl_psa.scorers.base import CacheShape, PageBatch

#: Bytes of one page of one KV head, float32.
PAGE_BYTES = 4


class ValueNorms:
    """State float32 [L, pages, Hkv]: max |v|_2 over the tokens of a page; no watermark of its own,
    as :class:`sgl_psa.value_means.ValueMeans`."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.norms = torch.zeros(
            shape.num_layers, shape.num_pages, shape.num_kv_heads, device=shape.device
        )

    def update(
        self, layer: int, pages: torch.Tensor, fill: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Recompute the norms of ``pages`` int64 [M] from their first ``fill`` int32 [M] tokens.

        Args:
            v_cache: [slots, Hkv, D], the layer's values.
        """
        size = self.shape.page_size
        norm = v_cache.unflatten(0, (-1, size))[pages].float().norm(dim=-1)
        live = torch.arange(size, device=norm.device) < fill[:, None]
        self.norms[layer, pages] = norm.masked_fill(~live[..., None], 0.0).amax(1)

    def log_weights(self, layer: int, batch: PageBatch, fresh: torch.Tensor) -> torch.Tensor:
        """log(norm of the page / mean norm of the row), float32 [B, Hkv, max_pages].

        Args:
            fresh: bool [B, max_pages], pages of the row that the state describes; 0 elsewhere, and
                in rows whose values are all zero.
        """
        pages = torch.where(fresh, batch.page_table.long(), 0)
        norms = self.norms[layer][pages].double().masked_fill(~fresh[..., None], 0.0)
        mean = norms.sum(1, keepdim=True) / fresh.sum(1).clamp(min=1)[:, None, None]
        known = fresh[..., None] & (mean > 0)
        weights = torch.where(known, norms.log() - mean.log(), 0.0)
        return weights.float().transpose(1, 2)

    def size_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.norms.numel() * PAGE_BYTES
