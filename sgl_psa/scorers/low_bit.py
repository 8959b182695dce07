"""What the scorers that keep a low-bit copy of every key share; one file each says which copy."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from sgl_psa_kernels import key_sketch

from sgl_psa.config import PSAConfig
from sgl_psa.scorers.base import CacheShape, PageBatch, Scorer

_VALUE_BYTES = 2  # float16
#: What a prepared score depends on: the batch and the candidates, and shape and dtype of queries.
_ScoreKey = tuple[PageBatch, torch.Tensor | None, torch.Size, torch.dtype]


def _same(a: _ScoreKey | None, b: _ScoreKey) -> bool:
    return a is not None and a[0] is b[0] and a[1] is b[1] and a[2:] == b[2:]


class LowBitScorer(Scorer):
    """Codes uint8 [L, pages, Hkv, P, D * bits / 8], the last two dimensions as ``key_sketch`` lays
    them out; affine float16 [..., P, values].

    A class attribute ``values`` says how many float16 values a key has besides its codes. ``signs``
    are those of the rotation before the codes are taken, ``None`` without one.
    """

    values: ClassVar[int]
    signs: torch.Tensor | None = None

    def __init__(self, shape: CacheShape, backend: str, bits: int) -> None:
        """
        Args:
            bits: 1, 2 or 4.

        Raises:
            ValueError: the head dimension does not fill whole bytes.
        """
        if shape.head_dim * bits % 8:
            raise ValueError(f"sketch_bits={bits} needs a head dimension that fills whole bytes")
        super().__init__(shape, backend)
        self.bits = bits
        pages = (shape.num_layers, shape.num_pages, shape.num_kv_heads, shape.page_size)
        self.codes = torch.zeros(
            *pages, shape.head_dim * bits // 8, dtype=torch.uint8, device=shape.device
        )
        self.affine = torch.zeros(*pages, self.values, dtype=torch.float16, device=shape.device)
        self._write: key_sketch.PreparedWrite | None = None
        self._score: key_sketch.PreparedScore | None = None
        self._score_key: _ScoreKey | None = None

    @classmethod
    def build(cls, config: PSAConfig, shape: CacheShape, backend: str) -> Self:
        return cls(shape, backend, config.sketch_bits)

    @classmethod
    def page_bytes(cls, page_size: int, head_dim: int, bits: int) -> int:
        return page_size * (head_dim * bits // 8 + cls.values * _VALUE_BYTES)

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.shape.page_size, self.shape.head_dim, self.bits)

    def on_write(self, layer: int, slots: torch.Tensor, k_cache: torch.Tensor) -> None:
        self._sketch(layer, slots, k_cache, in_order=False)

    def on_rows(self, layer: int, slots: torch.Tensor, k: torch.Tensor) -> None:
        self._sketch(layer, slots, k, in_order=True)

    def _sketch(self, layer: int, slots: torch.Tensor, k: torch.Tensor, *, in_order: bool) -> None:
        if self.backend == "cpu":
            if self._write is None or not self._write.serves(k, in_order):
                self._write = key_sketch.PreparedWrite(
                    k,
                    [(self.bits, self.codes, self.affine)],
                    self.watermark,
                    self.signs,
                    page_size=self.shape.page_size,
                    in_order=in_order,
                )
            self._write(layer, slots, k)
        else:
            self.encode(layer, slots, k, in_order=in_order)
            self.advance(layer, slots)

    def encode(
        self, layer: int, slots: torch.Tensor, k: torch.Tensor, *, in_order: bool = False
    ) -> None:
        """Sketch the keys at ``slots`` of a cache, or those given ``in_order``; the watermark
        stays."""
        key_sketch.write(
            k,
            slots,
            self.codes[layer],
            self.affine[layer],
            self.signs,
            bits=self.bits,
            page_size=self.shape.page_size,
            backend=self.backend,
            in_order=in_order,
        )

    def score(self, layer: int, q: torch.Tensor, batch: PageBatch, sm_scale: float) -> torch.Tensor:
        return self.score_codes(layer, self.rotate(q), batch, sm_scale)

    def rotate(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [B, Hq, D] in the basis that ``score_codes`` takes them in."""
        return q

    def score_codes(
        self,
        layer: int,
        q: torch.Tensor,
        batch: PageBatch,
        sm_scale: float,
        candidates: torch.Tensor | None = None,
        log_mass: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``score`` of queries in the basis of ``rotate``; into ``log_mass`` (float32 [B, Hq,
        max_pages]) if given, which pages with ``candidates`` (uint8 [B, Hkv, max_pages]) 0 keep."""
        if self.backend == "cpu":
            key = (batch, candidates, q.shape, q.dtype)
            if self._score is None or not _same(self._score_key, key):
                self._score, self._score_key = self._prepare_score(q, batch, candidates), key
            if log_mass is None:
                log_mass = torch.empty(*q.shape[:2], batch.page_table.shape[1])
            self._score(layer, q, log_mass, sm_scale)
            return log_mass
        return key_sketch.score(
            q,
            self.codes[layer],
            self.affine[layer],
            self.watermark[layer],
            batch.page_table,
            batch.seq_lens,
            batch.active,
            candidates,
            log_mass,
            bits=self.bits,
            page_size=self.shape.page_size,
            sm_scale=sm_scale,
            backend=self.backend,
        )

    def _prepare_score(
        self, q: torch.Tensor, batch: PageBatch, candidates: torch.Tensor | None
    ) -> key_sketch.PreparedScore:
        return key_sketch.prepare_score(
            q,
            self.codes,
            self.affine,
            self.watermark,
            batch.page_table,
            batch.seq_lens,
            batch.active,
            candidates,
            self.signs,
            bits=self.bits,
            page_size=self.shape.page_size,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.affine]
