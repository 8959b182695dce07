"""Watermarks: how many tokens of a page, from its start, a summary describes."""

from __future__ import annotations

import torch
from sgl_psa_kernels import watermark as kernel

#: Up to so many slots, a loop on the host is quicker than a dozen operations on tensors.
_FEW = 16
#: Up to so many slots on a device, finding each page once costs more than doing some twice.
_SMALL_BATCH = 512


def advance(
    watermark: torch.Tensor, slots: torch.Tensor, page_size: int, backend: str = "torch"
) -> None:
    """Record that the keys at ``slots`` were written, in place.

    A run that would leave a gap changes nothing (:func:`sgl_psa_kernels.watermark.advance`), so the
    page stays below its fill and is seen as stale.

    Args:
        watermark: int32 [num_pages].
        slots: int64 [N] in write order; N may be 0.
        page_size: tokens a page.
        backend: of the kernels; all but ``triton`` use torch.
    """
    if slots.numel() <= _FEW and slots.device.type == watermark.device.type == "cpu":
        marks = watermark.numpy()
        for slot in slots.tolist():
            page, offset = divmod(slot, page_size)
            if offset == 0 or marks[page] >= offset:
                marks[page] = offset + 1
        return
    name = "triton" if backend == "triton" else "torch"
    kernel.advance(watermark, slots, page_size=page_size, backend=name)


def touched_pages(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """Physical pages of ``slots``, int64; each once, but for few slots on a device, where pages may
    come twice and nothing waits."""
    pages = torch.div(slots, page_size, rounding_mode="floor")
    few = slots.device.type != "cpu" and slots.numel() <= _SMALL_BATCH
    return pages if few else torch.unique(pages)
