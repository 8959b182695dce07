"""Calls into the native library: argument structs from tensors, statuses to exceptions."""

import ctypes
from typing import Any, NoReturn

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.loader import load

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def dtype_code(op: str, tensor: torch.Tensor) -> int:
    """PsaDtype of a tensor.

    Raises:
        ValueError: the kernels do not have its dtype.
    """
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(
            f"{op}: backend 'cpu' has bfloat16, float16 and float32, not {tensor.dtype}; "
            "use backend='reference'"
        )
    return code


def require_cpu(op: str, *tensors: torch.Tensor | None) -> None:
    """Native kernels read host memory only."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            raise ValueError(f"{op}: backend 'cpu' needs CPU tensors, got one on {tensor.device}")


def rows(
    op: str,
    q: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    num_pages: int,
    page_size: int,
    sm_scale: float,
) -> abi.Rows:
    """PsaRows of a batch."""
    batch, num_qo_heads, head_dim = q.shape
    return abi.Rows(
        batch=batch,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        max_pages=page_table.shape[1],
        num_pages=num_pages,
        dtype=dtype_code(op, q),
        num_threads=torch.get_num_threads(),
        sm_scale=sm_scale,
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        page_table_stride=page_table.stride(0),
        q=q.data_ptr(),
        page_table=page_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
    )


def call(op: str, function: str, args: ctypes.Structure) -> None:
    """Call a function of the library.

    Raises:
        ValueError: the function refused its input.
        RuntimeError: no native library, or no memory.
    """
    status = getattr(load(), function)(ctypes.byref(args))
    if status != abi.OK:
        raise_status(op, status, args)


class PreparedCall:
    """A function of the library with arguments of its own, which stay between calls.

    ``args`` may be changed between calls; whoever changes a pointer keeps what it points to.
    """

    def __init__(self, op: str, function: str, args: ctypes.Structure) -> None:
        self.op = op
        self.args = args
        self._function = getattr(load(), function)
        self._reference = ctypes.byref(args)
        self._head = _head(args)

    def __call__(self) -> None:
        """As :func:`call`, with as many threads as torch has now."""
        self._head.num_threads = torch.get_num_threads()
        status = self._function(self._reference)
        if status:
            raise_status(self.op, status, self.args)


def _head(args: ctypes.Structure) -> Any:
    """The part of an argument struct that has num_threads and error_index."""
    rows = getattr(args, "rows", None)
    return rows if isinstance(rows, abi.Rows) else args


def raise_status(op: str, status: int, args: ctypes.Structure) -> NoReturn:
    """The exception for a status that is not OK; see :func:`call`."""
    index = _head(args).error_index
    if status == abi.NO_MEMORY:
        raise RuntimeError(f"{op}: out of memory for work space")
    messages = {
        abi.BAD_SEQ_LEN: f"seq_lens[{index}] is negative or needs more pages than page_table has",
        abi.BAD_PAGE: f"row or element {index} names a page outside of the pool",
        abi.BAD_MODE: f"mode[{index}] must be 0 (dense), 1 (marginal), 2 (coverage) or "
        "3 (conservative)",
        abi.NO_LOG_MASS: f"row {index} is not dense and needs log_mass; score the pages first",
        abi.BAD_SLOT: f"slots[{index}] lies outside of the pool",
        abi.BAD_FILL: f"fill[{index}] must be 1..page_size",
        abi.BAD_THRESHOLD: f"threshold[{index}] is not a number",
        abi.BAD_KIND: "unknown kind of page summary",
        abi.BAD_POSITION: f"positions[{index}] lies outside of cos_sin",
        abi.BAD_ROWS: f"x must have 1 to {abi.SKINNY_ROWS} rows",
    }
    raise ValueError(f"{op}: {messages.get(status, f'native status {status}')}")
