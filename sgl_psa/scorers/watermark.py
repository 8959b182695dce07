"""Watermarks: how many tokens of a page, from its start, a summary describes."""

from __future__ import annotations

import torch

#: Up to so many slots, a loop on the host is quicker than a dozen operations on tensors.
_FEW = 16
#: Up to so many slots on a device, finding each page once costs more than doing some twice.
_SMALL_BATCH = 512


def advance(watermark: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """Record that the keys at ``slots`` were written, in place.

    A run of consecutive slots inside a page extends the page's watermark to the run's end if it
    begins at the page's first slot (the page starts anew) or not beyond the watermark. A run that
    would leave a gap changes nothing, so the page stays below its fill and is seen as stale.

    Args:
        watermark: int32 [num_pages].
        slots: int64 [N] in write order; N may be 0.
        page_size: tokens a page.
    """
    count = slots.numel()
    if count == 0:
        return
    if count <= _FEW and slots.device.type == watermark.device.type == "cpu":
        marks = watermark.numpy()
        for slot in slots.tolist():
            page, offset = divmod(slot, page_size)
            if offset == 0 or marks[page] >= offset:
                marks[page] = offset + 1
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
    # What is not kept goes behind the last page: no shape depends on the data, so nobody waits.
    marks = torch.cat([watermark, watermark.new_zeros(1)])
    marks[torch.where(keep, pages, len(watermark))] = (offsets + 1).to(watermark.dtype)
    watermark.copy_(marks[:-1])


def touched_pages(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """Physical pages of ``slots``, int64; each once, but for few slots on a device, where pages may
    come twice and nothing waits."""
    pages = torch.div(slots, page_size, rounding_mode="floor")
    few = slots.device.type != "cpu" and slots.numel() <= _SMALL_BATCH
    return pages if few else torch.unique(pages)
