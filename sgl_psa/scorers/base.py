"""What every scorer has: page-keyed state for all layers, written wherever K is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.scorers import watermark as wm


class CacheShape(NamedTuple):
    """The KV cache that a scorer describes.

    Attributes:
        num_layers, num_pages, page_size, num_kv_heads, head_dim: sizes; ``num_pages`` counts
            every physical page, the padding page included.
        device: where keys and summaries live.
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    device: torch.device


class PageBatch(NamedTuple):
    """The pages of the requests of one decode step.

    Attributes:
        page_table: int32 [B, max_pages], physical page of each logical page; entries past a row's
            last page are unspecified.
        seq_lens: int32 [B], tokens, the current one included; 0 for padding rows.
        active: uint8 [B], 1 for rows that want scores.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    active: torch.Tensor

    def pages_scored(self, page_size: int) -> torch.Tensor:
        """Pages of each active row, int32 [B]; 0 for the others."""
        pages = torch.div(self.seq_lens + page_size - 1, page_size, rounding_mode="floor")
        return pages * self.active


class ScoredStep(NamedTuple):
    """A batch whose pages were scored in some layers.

    Attributes:
        chosen: int32 [L, B, Hkv], pages that were read more closely; 0 in layers not scored.
    """

    batch: PageBatch
    chosen: torch.Tensor


class Scorer(ABC):
    """Estimates, per page and query head, the log mass log sum exp(scale * q.k).

    State is keyed by physical page and is a pure function of the page's stored keys, so shared,
    re-used and re-filled pages need no bookkeeping beyond the watermark: the number of tokens of
    the page, from its start, that the state describes. A page whose watermark is below its fill is
    scored +inf, which the loop reads as "attend it exactly".
    """

    name: str

    def __init__(self, shape: CacheShape, backend: str) -> None:
        self.shape = shape
        self.backend = backend
        self.watermark = torch.zeros(
            shape.num_layers, shape.num_pages, dtype=torch.int32, device=shape.device
        )

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> Self:
        """A scorer of this class with the settings that it takes from ``config``.

        Raises:
            ValueError: the cache's shape or a setting does not suit the scorer.
        """
        return cls(shape, backend)

    @classmethod
    @abstractmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        """Bytes of state of one page of one KV head.

        Args:
            bits: ``PSAConfig.summary_bits`` for page summaries, ``PSAConfig.sketch_bits`` else.
        """

    @property
    @abstractmethod
    def bytes_per_page(self) -> int:
        """Bytes of state read to score one page of one KV head of this cache, at most."""

    @property
    def step(self) -> ScoredStep | None:
        """The newest batch that was scored, where ``read_bytes`` needs it."""
        return None

    def read_bytes(self, layer: int | slice, step: ScoredStep | None = None) -> torch.Tensor | None:
        """Bytes that scoring a batch read in a layer, float32 [B, Hkv], or in each of several
        layers, [..., B, Hkv], padding and inactive rows 0; ``None``: ``bytes_per_page`` for every
        page scored.

        Args:
            step: of the batch, the newest by default.
        """
        return None

    @abstractmethod
    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        """Bring the state up to date after K rows were stored.

        Args:
            layer: index of the layer in this pool.
            slots: int64 [N], in the order of the tokens.
            k_cache: [slots, Hkv, D], the layer's keys, the new rows already stored.
        """

    def on_rows(self, layer: int, slots: torch.Tensor, k: torch.Tensor) -> None:
        """As :meth:`on_write`, from the new keys alone: a cache that is not all in memory.

        Args:
            slots: int64 [N], in the order of the tokens, none twice.
            k: [N, Hkv, D], row i is the key of ``slots[i]``.

        Raises:
            ValueError: the state of a page needs all keys of the page.
        """
        raise ValueError(
            f"scorer {self.name!r} summarises whole pages; a tiered KV pool needs low-bit keys: "
            "use sketch, rotated_sketch or two_level"
        )

    @abstractmethod
    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        """Estimated log masses.

        Args:
            q: [B, Hq, D].

        Returns:
            float32 [B, Hq, max_pages]; unspecified past a row's last page and for inactive rows.
        """

    @abstractmethod
    def state_tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state, the watermark aside; first dimension is the layer."""

    def advance(self, layer: int, slots: torch.Tensor) -> None:
        """Move the watermarks of the pages that ``slots`` were written to."""
        wm.advance(self.watermark[layer], slots, self.shape.page_size, self.backend)

    def invalidate_slots(self, slots: torch.Tensor) -> None:
        """Forget what is known of the pages of ``slots`` in every layer."""
        self.watermark[:, torch.div(slots, self.shape.page_size, rounding_mode="floor")] = 0

    def invalidate_all(self) -> None:
        """Forget every page."""
        self.watermark.zero_()

    def size_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(t.numel() * t.element_size() for t in [self.watermark, *self.state_tensors()])
