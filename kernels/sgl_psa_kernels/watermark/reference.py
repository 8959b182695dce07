"""Watermarks token by token: the specification."""

import torch


def advance(watermark: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """See :func:`sgl_psa_kernels.watermark.advance`."""
    marks = watermark.tolist()
    for slot in slots.tolist():
        page, offset = divmod(slot, page_size)
        if offset == 0 or marks[page] >= offset:
            marks[page] = offset + 1
    watermark.copy_(torch.tensor(marks, dtype=watermark.dtype))
