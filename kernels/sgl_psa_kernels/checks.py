"""Argument checks shared by the operators. Each raises ValueError that names the fix.

The checks look at shapes, dtypes, devices and strides only: no tensor is read.
"""

import torch

KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    contiguous: bool = True,
) -> None:
    """Check dtype and shape; ``None`` in ``shape`` accepts any size in that place."""
    require(tensor.dtype == dtype, f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape [{want}], got {list(tensor.shape)}")
    require(
        not contiguous or tensor.is_contiguous(),
        f"{op}: {name} must be contiguous; pass {name}.contiguous()",
    )


def check_page_size(op: str, page_size: int) -> None:
    """A page size is a power of two."""
    require(
        page_size >= 1 and page_size & (page_size - 1) == 0,
        f"{op}: page_size must be a power of two (16 is usual), got {page_size}",
    )


def check_cache(op: str, name: str, cache: torch.Tensor, page_size: int) -> None:
    """Check a K or V pool of shape [slots, Hkv, D] with whole pages."""
    check_page_size(op, page_size)
    require(cache.dim() == 3, f"{op}: {name} must be [slots, Hkv, D], got {list(cache.shape)}")
    require(
        cache.dtype in KV_DTYPES,
        f"{op}: {name} must be bfloat16, float16 or float32, got {cache.dtype}",
    )
    require(
        cache.shape[0] % page_size == 0,
        f"{op}: {name} has {cache.shape[0]} slots, not a multiple of page_size {page_size}; "
        "allocate whole pages",
    )
    require(cache.stride(2) == 1, f"{op}: last dimension of {name} must be contiguous")
    require(
        cache.shape[2] % 16 == 0 and cache.shape[2] > 0,
        f"{op}: head_dim must be a multiple of 16, got {cache.shape[2]}",
    )


def check_queries(op: str, q: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Check queries [B, Hq, D] against the KV heads they use."""
    require(q.dim() == 3, f"{op}: q must be [B, Hq, D], got {list(q.shape)}")
    require(q.dtype in KV_DTYPES, f"{op}: q must be bfloat16, float16 or float32, got {q.dtype}")
    require(q.shape[2] == head_dim, f"{op}: q has head_dim {q.shape[2]}, the pages have {head_dim}")
    require(
        q.shape[1] > 0 and num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0,
        f"{op}: {q.shape[1]} query heads are no multiple of {num_kv_heads} KV heads",
    )
    require(q.stride(2) == 1, f"{op}: last dimension of q must be contiguous")


def check_rows(op: str, page_table: torch.Tensor, seq_lens: torch.Tensor, batch: int) -> None:
    """Check page_table int32 [B, max_pages] and seq_lens int32 [B]."""
    check_tensor(op, "page_table", page_table, torch.int32, (batch, None), contiguous=False)
    require(
        page_table.shape[1] <= 1 or page_table.stride(1) == 1,
        f"{op}: rows of page_table must be contiguous",
    )
    check_tensor(op, "seq_lens", seq_lens, torch.int32, (batch,))


def check_row_length(op: str, row: int, seq_len: int, max_pages: int, page_size: int) -> int:
    """Number of pages of a row of ``seq_len`` tokens; it must fit its row of the page table."""
    require(seq_len >= 0, f"{op}: seq_lens[{row}] is negative ({seq_len})")
    num_pages = -(-seq_len // page_size)
    require(
        num_pages <= max_pages,
        f"{op}: seq_lens[{row}] = {seq_len} needs {num_pages} pages, page_table has {max_pages}",
    )
    return num_pages
