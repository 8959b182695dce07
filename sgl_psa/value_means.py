"""Means of the values of each page, and what pages left out add to the output by them.

On the embedded model at 8192 tokens and delta 0.1 it takes the mean output error from 0.21 to 0.09
for 0.03 of dense attention's bytes; reading more pages instead takes 0.08 of them
(``benchmark/stop_rules.py``).
"""

from __future__ import annotations

import torch
from sgl_psa_kernels import page_summary, tail_compensation

from sgl_psa.scorers.base import CacheShape, PageBatch

_ELEMENT_BYTES = 2  # bfloat16


class ValueMeans:
    """State bfloat16 [L, pages, Hkv, 1, D], a pure function of the stored values of each page.

    There is no watermark of its own: K and V of a token are written together, so the scorer's says
    how many tokens a mean describes. A page that the scorer calls stale is attended, and its mean
    is not read.
    """

    def __init__(self, shape: CacheShape, backend: str) -> None:
        self.shape = shape
        self.backend = backend
        self.means = torch.zeros(
            shape.num_layers,
            shape.num_pages,
            shape.num_kv_heads,
            1,
            shape.head_dim,
            dtype=torch.bfloat16,
            device=shape.device,
        )

    def update(
        self, layer: int, pages: torch.Tensor, fill: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Recompute the means of ``pages`` int64 [M] from their first ``fill`` int32 [M] tokens.

        Args:
            v_cache: [slots, Hkv, D], the layer's values.
        """
        page_summary.update(
            v_cache,
            pages,
            fill,
            self.means[layer],
            kind="mean",
            page_size=self.shape.page_size,
            backend=self.backend,
        )

    def compensate(
        self,
        layer: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        log_mass: torch.Tensor,
        left: torch.Tensor,
        batch: PageBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tail compensation of the active rows (:mod:`sgl_psa_kernels.tail_compensation`).

        The operator has no C++ kernel: backend ``cpu`` runs it in torch.

        Args:
            out, lse, log_mass: [B, Hq, D], float32 [B, Hq] and float32 [B, Hq, max_pages].
            left: bool [B, Hkv, max_pages], pages of active rows that were not attended.

        Returns:
            The output, and the bytes of means read, float32 [B, Hkv].
        """
        compensated = tail_compensation.compensate(
            out,
            lse,
            log_mass,
            (~left).to(torch.uint8),
            self.means[layer, :, :, 0],
            batch.page_table,
            batch.seq_lens,
            batch.active,
            page_size=self.shape.page_size,
            backend="torch" if self.backend == "cpu" else self.backend,
        )
        read = left.sum(-1, dtype=torch.float32) * (_ELEMENT_BYTES * self.shape.head_dim)
        return compensated, read

    def size_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.means.numel() * _ELEMENT_BYTES
