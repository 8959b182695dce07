"""Page-aligned KV slot allocation in torch, for machines where SGLang's Triton kernels cannot run.

Free lists, frees and evictions are SGLang's; only the two allocation kernels are replaced.
"""

from __future__ import annotations

import torch

from sglang_psa.compat import PagedTokenToKVPoolAllocator


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """Hands out slots so that every page is filled from offset 0 by one request.

    Lengths are int64 [B]. ``last_loc`` is the slot of each request's last token, -1 for none; its
    dtype differs between the two callers (int64 on extend, int32 on decode).
    """

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of tokens ``prefix_len .. seq_len - 1`` of each request, int64 [extend_num_tokens].

        Returns ``None``, with nothing taken, when the free pages do not suffice.
        """
        size = self.page_size
        prefix, end, last = prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist()
        counts = [-(-e // size) - -(-p // size) for p, e in zip(prefix, end, strict=True)]
        pages = self._take(sum(counts))
        if pages is None:
            return None
        pieces, taken = [], 0
        for start, stop, before, count in zip(prefix, end, last, counts, strict=True):
            room = min(stop, -(-start // size) * size) - start
            pieces.append(torch.arange(before + 1, before + 1 + room))
            new = pages[taken : taken + count, None] * size + torch.arange(size)
            pieces.append(new.reshape(-1)[: stop - start - room])
            taken += count
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Slot of token ``seq_len - 1`` of each request, int64 [B]; ``None`` when pages are out."""
        lens = seq_lens.tolist()
        opens_page = [row for row, n in enumerate(lens) if (n - 1) % self.page_size == 0]
        pages = self._take(len(opens_page))
        if pages is None:
            return None
        slots = last_loc.to(torch.int64) + 1
        if opens_page:
            slots[opens_page] = pages * self.page_size
        return slots

    def _take(self, count: int) -> torch.Tensor | None:
        if count > len(self.free_pages) and self.need_sort:
            self.merge_and_sort_free()
        if count > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return taken
