"""Host memory in huge pages: fewer address translations for ops that read scattered pages of KV.

Linux gives transparent huge pages, where set to ``madvise``, only to memory that asks for them
before it is first written, and allocators of tensors do not ask.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

#: Below this many bytes nothing is gained.
MIN_BYTES = 4 << 20


def zero_in_huge_pages(tensor: torch.Tensor) -> bool:
    """Fill a contiguous tensor with zeros, in huge pages where the system has them.

    Its memory is given back, and taken anew when it is first used: what nobody writes costs
    nothing. Off Linux, on other devices, for small tensors and where the kernel refuses, the tensor
    is filled and nothing else.

    Returns:
        Whether the kernel took the advice.
    """
    size = tensor.numel() * tensor.element_size()
    on_host = tensor.device.type == "cpu" and not tensor.is_shared()
    if sys.platform != "linux" or not on_host or size < MIN_BYTES or not tensor.is_contiguous():
        tensor.zero_()
        return False
    # Whole pages inside of the tensor: the allocator keeps what is its own on the others.
    start = tensor.data_ptr()
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if not _renew(begin, end - begin):
        tensor.zero_()
        return False
    as_bytes = tensor.view(-1).view(torch.uint8)
    as_bytes[: begin - start] = 0
    as_bytes[end - start :] = 0
    return True


def _renew(begin: int, size: int) -> bool:
    """Whether whole pages, of private memory, are zero again and huge once they are written."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # In this order: a kernel that refuses the first leaves the memory as it is.
    advices = (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED)
    return all(madvise(begin, size, advice) == 0 for advice in advices)
