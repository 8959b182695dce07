"""Watermarks for any torch device, all slots at once; nothing waits for the device."""

from __future__ import annotations

import torch


def advance(watermark: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """See :func:`sgl_psa_kernels.watermark.advance`."""
    count = slots.numel()
    if count == 0:
        return
    pages = torch.div(slots, page_size, rounding_mode="floor")
    offsets = slots - pages * page_size
    starts = torch.ones(count, dtype=torch.bool, device=slots.device)
    starts[1:] = (slots[1:] != slots[:-1] + 1) | (offsets[1:] == 0)
    valid = (offsets == 0) | (watermark[pages] >= offsets)
    index = torch.arange(count, device=slots.device)
    run_start = torch.where(starts, index, torch.zeros_like(index)).cummax(0).values
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    keep = ends & valid[run_start]
    # What is not kept goes behind the last page: no shape depends on the data.
    marks = torch.cat([watermark, watermark.new_zeros(1)])
    marks[torch.where(keep, pages, len(watermark))] = (offsets + 1).to(watermark.dtype)
    watermark.copy_(marks[:-1])
