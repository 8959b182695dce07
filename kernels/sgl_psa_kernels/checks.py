"""Argument checks shared by the operators. Each raises ValueError that names the fix.

The checks look at shapes, dtypes, devices and strides only: no tensor is read. They run for every
layer of a decode step, so no message is made before it is needed.
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
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    have = tensor.shape
    fits = len(have) == len(shape)
    if fits and have != shape:
        fits = all(want is None or want == size for want, size in zip(shape, have, strict=True))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape [{sizes}], got {list(have)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous; pass {name}.contiguous()")


def check_page_size(op: str, page_size: int) -> None:
    """A page size is a power of two."""
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"{op}: page_size must be a power of two (16 is usual), got {page_size}")


def check_cache(op: str, name: str, cache: torch.Tensor, page_size: int) -> None:
    """Check a K or V pool of shape [slots, Hkv, D] with whole pages."""
    check_page_size(op, page_size)
    if cache.dim() != 3:
        raise ValueError(f"{op}: {name} must be [slots, Hkv, D], got {list(cache.shape)}")
    if cache.dtype not in KV_DTYPES:
        raise ValueError(f"{op}: {name} must be bfloat16, float16 or float32, got {cache.dtype}")
    slots, _, head_dim = cache.shape
    if slots % page_size:
        raise ValueError(
            f"{op}: {name} has {slots} slots, not a multiple of page_size {page_size}; "
            "allocate whole pages"
        )
    if cache.stride(2) != 1:
        raise ValueError(f"{op}: last dimension of {name} must be contiguous")
    if head_dim % 16 or head_dim <= 0:
        raise ValueError(f"{op}: head_dim must be a multiple of 16, got {head_dim}")


def check_queries(op: str, q: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Check queries [B, Hq, D] against the KV heads they use."""
    if q.dim() != 3:
        raise ValueError(f"{op}: q must be [B, Hq, D], got {list(q.shape)}")
    if q.dtype not in KV_DTYPES:
        raise ValueError(f"{op}: q must be bfloat16, float16 or float32, got {q.dtype}")
    _, heads, dim = q.shape
    if dim != head_dim:
        raise ValueError(f"{op}: q has head_dim {dim}, the pages have {head_dim}")
    if heads <= 0 or num_kv_heads <= 0 or heads % num_kv_heads:
        raise ValueError(f"{op}: {heads} query heads are no multiple of {num_kv_heads} KV heads")
    if q.stride(2) != 1:
        raise ValueError(f"{op}: last dimension of q must be contiguous")


def check_rows(op: str, page_table: torch.Tensor, seq_lens: torch.Tensor, batch: int) -> None:
    """Check page_table int32 [B, max_pages] and seq_lens int32 [B]."""
    check_tensor(op, "page_table", page_table, torch.int32, (batch, None), contiguous=False)
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"{op}: rows of page_table must be contiguous")
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
