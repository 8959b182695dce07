"""The true log mass of every page, from the keys themselves: for oracles and audits.

This scorer reads every key, so it saves nothing. Its ``bytes_per_page`` is 0 all the same: the
bytes reported with it are those of the pages attended, which is what a perfect scorer that costs
nothing would leave to read.
"""

from __future__ import annotations

import torch

from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

#: Pages whose logits are held at once.
_CHUNK = 256


class ExactScorer(Scorer):
    """No state but a reference to each layer's key cache, taken when keys are written.

    The watermark is kept as by every scorer, so pages that were released or refilled behind the
    scorer's back are +inf here too.
    """

    name = "exact"

    def __init__(self, shape: CacheShape, backend: str) -> None:
        super().__init__(shape, backend)
        self._keys: dict[int, torch.Tensor] = {}

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        return 0

    @property
    def bytes_per_page(self) -> int:
        return 0

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        self._keys[layer] = k_cache
        self.advance(layer, slots)

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        """
        Raises:
            RuntimeError: nothing was written to this layer yet, so there is no key cache.
        """
        if layer not in self._keys:
            raise RuntimeError(
                f"scorer 'exact' has seen no keys of layer {layer}; write them first"
            )
        page_size = self.shape.page_size
        keys = self._keys[layer].unflatten(0, (-1, page_size))  # [pages, P, Hkv, D]
        x = (q.float() * sm_scale).unflatten(1, (self.shape.num_kv_heads, -1))
        place = torch.arange(batch.page_table.shape[1], device=q.device)
        tokens = (batch.seq_lens[:, None] - place * page_size).clamp(0, page_size)
        usable = (tokens > 0) & (batch.active[:, None] != 0)
        table = torch.where(usable, batch.page_table.long(), 0)
        # Rows that share a page (and see as many of its tokens) share the reading of it.
        pairs, which = torch.unique(table * (page_size + 1) + tokens, return_inverse=True)
        mass = [
            self._masses(layer, keys, x, some // (page_size + 1), some % (page_size + 1))
            for some in pairs.split(_CHUNK)
        ]
        each = which[:, None, None].expand(-1, *x.shape[1:3], -1)
        return torch.cat(mass, -1).gather(-1, each).flatten(1, 2)

    def _masses(
        self,
        layer: int,
        keys: torch.Tensor,
        x: torch.Tensor,
        pages: torch.Tensor,
        used: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [B, Hkv, G, N]: of the first ``used`` [N] tokens of ``pages`` [N], any row."""
        logits = torch.einsum("bhgd,kphd->bhgkp", x, keys[pages].float())
        dead = torch.arange(self.shape.page_size, device=x.device) >= used[:, None]
        estimate = logits.masked_fill(dead, float("-inf")).logsumexp(-1)
        stale = self.watermark[layer][pages] < used
        return estimate.masked_fill(stale | ~(estimate < float("inf")), float("inf"))

    def state_tensors(self) -> list[torch.Tensor]:
        return []
