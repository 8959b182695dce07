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

    Its memory is given back and taken anew, so that pages that were written before can be huge too.
    Off Linux, on other devices, for small tensors and where the kernel refuses, it does nothing but
    fill.

    Returns:
        Whether the kernel took the advice.
    """
    advised = _renew(tensor)
    tensor.zero_()
    return advised


def _renew(tensor: torch.Tensor) -> bool:
    size = tensor.numel() * tensor.element_size()
    on_host = tensor.device.type == "cpu" and not tensor.is_shared()
    if sys.platform != "linux" or not on_host or size < MIN_BYTES or not tensor.is_contiguous():
        return False
    # Whole pages inside of the tensor: the allocator keeps what is its own on the others.
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return all(
        madvise(begin, end - begin, advice) == 0
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED)
    )
