"""All that is kept of the pages of a KV cache: the scorer's state of K, and that of V if needed."""

from __future__ import annotations

import torch

from sgl_psa.backends import around
from sgl_psa.config import PSAConfig
from sgl_psa.page_values import PageValues
from sgl_psa.scorers import CacheShape, Scorer, make_scorer
from sgl_psa.scorers import watermark as wm
from sgl_psa.value_means import ValueMeans
from sgl_psa.value_norms import ValueNorms


class Summaries:
    """Written wherever K and V are written; the scorer's watermark holds for all of it."""

    def __init__(self, scorer: Scorer, values: PageValues) -> None:
        self.scorer = scorer
        self.values = values

    def on_write(
        self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Bring the state up to date after rows of K and V were stored.

        Args:
            layer: index of the layer in this pool.
            slots: int64 [N], in the order of the tokens.
            k_cache, v_cache: [slots, Hkv, D], the new rows already stored.
        """
        self.scorer.on_write(layer, slots, k_cache)
        if not self.values.states or slots.numel() == 0:
            return
        pages = wm.touched_pages(slots, self.scorer.shape.page_size)
        # A page of watermark 0 (rows written behind a gap) is stale, so nobody reads its state.
        fill = self.scorer.watermark[layer][pages].clamp(min=1)
        for state in self.values.states:
            state.update(layer, pages, fill, v_cache)

    def on_rows(self, layer: int, slots: torch.Tensor, k: torch.Tensor) -> None:
        """As :meth:`on_write`, from the new keys alone; see :meth:`Scorer.on_rows`.

        Raises:
            ValueError: the scorer needs whole pages, or something is kept of the values.
        """
        if self.values.states:
            raise ValueError(
                "what is kept of values needs whole pages: drop --psa-compensate and "
                "--psa-stop change"
            )
        self.scorer.on_rows(layer, slots, k)

    def invalidate_slots(self, slots: torch.Tensor) -> None:
        """Forget what is known of the pages of ``slots`` in every layer."""
        self.scorer.invalidate_slots(slots)

    def invalidate_all(self) -> None:
        """Forget every page."""
        self.scorer.invalidate_all()

    def size_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.scorer.size_bytes() + self.values.size_bytes()


def make_summaries(
    config: PSAConfig,
    shape: CacheShape,
    backend: str,
    *,
    means: bool = False,
    norms: bool = False,
) -> Summaries:
    """What ``config`` needs, allocated for ``shape``.

    Args:
        means, norms: keep value means, value norms, even if ``config`` needs none.

    Raises:
        ValueError: the cache's shape or a setting does not suit the scorer.
    """
    backend = around(backend)
    values = PageValues(
        ValueMeans(shape, backend) if means or config.compensate else None,
        ValueNorms(shape) if norms or config.stop == "change" else None,
    )
    return Summaries(make_scorer(config, shape, backend), values)
