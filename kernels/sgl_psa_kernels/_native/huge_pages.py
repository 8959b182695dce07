"""Huge pages for large tensors in host memory."""

import ctypes
import sys

import torch

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25


def use_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask for 2 MiB pages behind a contiguous CPU tensor; its contents stay as they are.

    Reading rows at random places of a large tensor then costs fewer address translations. What the
    tensor does not fill of its first and last huge page stays as it is.

    Returns:
        Whether the system took the request: False where it is not Linux, where transparent huge
        pages are not built in, and for a tensor without a whole huge page.
    """
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if tensor.device.type != "cpu" or sys.platform != "linux" or end <= begin:
        return False
    libc = ctypes.CDLL(None)
    span = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
    if libc.madvise(*span, _MADV_HUGEPAGE) != 0:
        return False
    # Linux 6.1 moves what was touched before into huge pages at once; older ones do so by and by.
    libc.madvise(*span, _MADV_COLLAPSE)
    return True
