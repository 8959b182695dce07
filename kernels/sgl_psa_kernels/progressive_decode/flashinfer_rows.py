"""FlashInfer's paged decode, planned once for rows whose lengths only the device knows.

A plan cuts long rows into parts on the host, from the lengths that it is told. Rows of at most
``ROW_TOKENS`` tokens are never cut (0.6.15: ``scheduler.cuh`` makes no part of less than 128
tokens, tensor cores are told not to), so a plan for full rows serves shorter ones, down to none:
the kernels take a row's length from ``last_page_len`` on the device. What they make of a row of
none must not be used. One plan serves every step and layer of the same shape.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch

from sgl_psa_kernels.checks import require

#: Tokens of a row, or one page if it is longer.
ROW_TOKENS = 128
#: Of the workspace that all plans of a device share.
_WORKSPACE_BYTES = 64 << 20
#: Of a plan's own one, for its tables; and as much pinned.
_TABLE_BYTES, _TABLE_BYTES_A_ROW = 1 << 20, 128
_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)
#: From so many query heads to a KV head on, and for numbers that its other kernel lacks,
#: FlashInfer multiplies on tensor cores, as SGLang has it do.
_TENSOR_CORES_FROM = 4


class RowShape(NamedTuple):
    """What a plan depends on.

    Attributes:
        rows: of the batch that FlashInfer sees, each with one KV head; a power of two, so that
            there are few plans.
        group: query heads of a row.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    group: int
    head_dim: int
    page_size: int
    sm_scale: float

    @property
    def pages(self) -> int:
        """Of a full row."""
        return row_pages(self.page_size)


class Rows(NamedTuple):
    """A plan and the buffers that it reads.

    Attributes:
        wrapper: FlashInfer's.
        indices: int32 [rows * pages], pages of every row.
        last_page_len: int32 [rows], tokens of the row less those of ``pages - 1`` pages.
        empty: ``last_page_len`` of a row without tokens.
    """

    wrapper: Any
    indices: torch.Tensor
    last_page_len: torch.Tensor
    empty: int

    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [rows, group, D] over pages [any, 1, page_size, D]: out as q, and lse
        float32 [rows, group] to the base 2."""
        out, lse = self.wrapper.run(q, (k_pages, v_pages), return_lse=True)
        return out, lse


def row_pages(page_size: int) -> int:
    """Pages of a full row."""
    return max(1, ROW_TOKENS // page_size)


def flashinfer_available() -> tuple[bool, str]:
    """(usable, what is missing and how to get it)."""
    if importlib.util.find_spec("flashinfer") is None:
        return False, "package flashinfer is missing; pip install flashinfer-python==0.6.15.post1"
    return True, ""


def check(op: str, dtype: torch.dtype, head_dim: int) -> None:
    """Refuse what FlashInfer's decode has no kernel for.

    Raises:
        ValueError: the dtype or the head dimension; the message names those it has.
        RuntimeError: FlashInfer is missing.
    """
    names = " or ".join(str(t).removeprefix("torch.") for t in _DTYPES)
    require(
        dtype in _DTYPES,
        f"{op}: FlashInfer attends {names}, got {str(dtype).removeprefix('torch.')}; use "
        "backend 'triton'",
    )
    require(
        head_dim in _DIMS,
        f"{op}: FlashInfer has heads of {', '.join(map(str, _DIMS))} elements, got {head_dim}; use "
        "backend 'triton'",
    )
    available, reason = flashinfer_available()
    if not available:
        raise RuntimeError(f"{op}: {reason}")


@functools.cache
def planned(shape: RowShape) -> Rows:
    """The plan for rows of ``shape``, made when first asked for and never given up: captured CUDA
    graphs may have its addresses.

    Raises:
        RuntimeError: that is while a CUDA graph is captured.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if shape.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "progressive_decode: FlashInfer cannot plan while a CUDA graph is captured; run the "
            "step once before"
        )

    def numbers(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=shape.device)

    bounds = torch.arange(shape.rows + 1, dtype=torch.int32) * shape.pages
    indices, last = numbers(shape.rows * shape.pages), numbers(shape.rows)
    tensor_cores = shape.group >= _TENSOR_CORES_FROM
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(shape.device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=bounds.to(shape.device),
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    table_bytes = _TABLE_BYTES + _TABLE_BYTES_A_ROW * shape.rows
    tables = torch.empty(table_bytes, dtype=torch.uint8, device=shape.device)
    wrapper.reset_workspace_buffer(_workspace(shape.device), tables)
    wrapper.plan(
        bounds,
        torch.zeros(shape.rows * shape.pages, dtype=torch.int32),
        torch.full((shape.rows,), shape.page_size, dtype=torch.int32),
        shape.group,
        1,
        shape.head_dim,
        shape.page_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=shape.sm_scale,
        disable_split_kv=tensor_cores,
    )
    return Rows(wrapper, indices, last, -(shape.pages - 1) * shape.page_size)


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
