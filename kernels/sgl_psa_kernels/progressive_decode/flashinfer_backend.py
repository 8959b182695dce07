"""Progressive decode with FlashInfer's paged decode for the pages of lists.

All that chooses pages, and the rounds that are left when lists have been attended, are the Triton
kernels of ``triton_backend.py``. Where they attend a list (forced pages, a predicted first group,
large groups), FlashInfer takes its end instead, in rows of up to 128 tokens of one KV head
(``flashinfer_rows.py``), and partial results are merged by log-sum-exp. Nothing waits for the
device. Rows that hold the masses of pages against their estimates (coverage rules) stay with
Triton: FlashInfer tells the mass of a row, not of its pages.

In place of a page of FlashInfer's stands a page of one KV head: index i begins i times the greatest
common divisor of the pool's strides of pages and of heads, so K and V are read where they lie,
however the pool stores its heads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.progressive_decode import flashinfer_rows, triton_backend
from sgl_psa_kernels.progressive_decode.flashinfer_rows import Rows, RowShape
from sgl_psa_kernels.triton_support import kernels, power_of_two

#: Part of the longest context that rows are there for where there are estimates, and the most rows
#: of a batch; Triton attends what is in a list besides. Every row costs a copy of its queries and
#: an output, used or not.
SHARE = 0.25
ROWS = 1 << 14

_OP = "progressive_decode"


def progressive_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    log_mass: torch.Tensor | None,
    mode: torch.Tensor,
    threshold: torch.Tensor,
    kappa_floor: torch.Tensor,
    kappa_std: torch.Tensor,
    *,
    page_size: int,
    sm_scale: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`.

    Raises:
        ValueError: a dtype or head dimension that FlashInfer lacks, or K and V of other strides.
        RuntimeError: no FlashInfer, or its plan would be made while a CUDA graph is captured.
    """
    flashinfer_rows.check(_OP, q.dtype, q.shape[-1])
    told = log_mass is not None and options.get("residuals") is not None
    shared = None
    if page_table.shape[1] and len(q):
        share = SHARE if log_mass is not None else 1.0
        shared = _FlashInferLists(
            q, k_cache, v_cache, page_table, seq_lens, mode, page_size, sm_scale, share, told
        )
    return triton_backend.progressive_decode(
        q, k_cache, v_cache, page_table, seq_lens, log_mass, mode, threshold, kappa_floor,
        kappa_std, page_size=page_size, sm_scale=sm_scale, shared=shared, **options,
    )  # fmt: skip


class HeadPages(NamedTuple):
    """A cache [slots, Hkv, D] as pages of one KV head.

    Attributes:
        k, v: [any, 1, page_size, D] views; they overlap.
        page_step, head_step: numbers from a page's to the next's, from a head's to the next's.
    """

    k: torch.Tensor
    v: torch.Tensor
    page_step: int
    head_step: int


def head_pages(k_cache: torch.Tensor, v_cache: torch.Tensor, page_size: int) -> HeadPages:
    """The view of both caches.

    Raises:
        ValueError: their strides differ, or elements of a head do not follow each other.
    """
    slot, head, element = k_cache.stride()
    require(
        v_cache.stride() == k_cache.stride() and element == 1,
        f"{_OP}: FlashInfer reads K and V of equal strides, elements side by side; got "
        f"{k_cache.stride()} and {v_cache.stride()}; use backend 'triton'",
    )
    unit = math.gcd(page_size * slot, head)
    page_step, head_step = page_size * slot // unit, head // unit
    pages = k_cache.shape[0] // page_size
    size = (pages - 1) * page_step + (k_cache.shape[1] - 1) * head_step + 1
    views = [
        cache.as_strided((size, 1, page_size, cache.shape[2]), (unit, unit, slot, 1))
        for cache in (k_cache, v_cache)
    ]
    return HeadPages(views[0], views[1], page_step, head_step)


class _FlashInferLists:
    """What :mod:`triton_backend` calls where it attends a list."""

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        mode: torch.Tensor,
        page_size: int,
        sm_scale: float,
        share: float,
        told: bool,
    ) -> None:
        self._lists = kernels(_OP, f"{_OP}.triton_lists", q, k_cache, page_table)
        self._pages = head_pages(k_cache, v_cache, page_size)
        self._rule = (mode, seq_lens, page_table)
        self._told = told
        batch, num_q, dim = q.shape
        self._heads = num_kv = k_cache.shape[1]
        group, self._pairs = num_q // num_kv, batch * num_kv
        wanted = math.ceil(page_table.shape[1] * share / flashinfer_rows.row_pages(page_size))
        self._rows_each = min(wanted, max(1, ROWS // self._pairs))
        self._used = self._pairs * self._rows_each
        rows = power_of_two(self._used)
        self._shape = RowShape(q.device, q.dtype, rows, group, dim, page_size, sm_scale)
        self._planned: Rows = flashinfer_rows.planned(self._shape)
        self._q = q.new_empty(rows, group, dim)
        mine = self._q[: self._used].view(batch, num_kv, self._rows_each, group, dim)
        mine.copy_(q.unflatten(1, (num_kv, group))[:, :, None].expand_as(mine))

    def take(self, listed: torch.Tensor, counts: torch.Tensor, forced: bool) -> torch.Tensor:
        """Give ends of the lists ``listed`` [R, M] of ``counts`` [R] pages to FlashInfer.

        Returns:
            int32 [R], how many of the first pages are left.
        """
        mode, seq_lens, page_table = self._rule
        left = torch.empty_like(counts)
        self._planned.last_page_len[self._used :].fill_(self._planned.empty)
        self._lists.share_lists[(self._pairs, self._rows_each)](
            mode, seq_lens, page_table, listed, counts, left,
            self._planned.indices, self._planned.last_page_len,
            self._pages.page_step, self._pages.head_step, page_table.stride(0),
            page_table.shape[1], self._rows_each,
            FORCED=forced, TOLD=self._told, HKV=self._heads,
            PAGE=self._shape.page_size, PAGES=self._shape.pages, PT=power_of_two(self._shape.pages),
        )  # fmt: skip
        return left

    def merge(
        self, counts: torch.Tensor, left: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Attend what was taken, and merge it into ``out`` [R, G, D] and ``lse`` [R, G]."""
        row_out, row_lse = self._planned.run(self._q, self._pages.k, self._pages.v)
        group, dim = self._shape.group, self._shape.head_dim
        self._lists.merge_rows[(self._pairs, group)](
            counts, left, row_out, row_lse, out, lse, self._rows_each,
            G=group, D=dim, DT=power_of_two(dim, 16), PAGES=self._shape.pages,
            FT=power_of_two(self._rows_each), BLOCK=16,
        )  # fmt: skip
