"""Sums of attention weights by page over recent decode steps, one request slot at a time.

A sum falls by the factor 1 - 1/window a step, which stands for ALISA's sum over the last ``window``
steps without keeping each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_psa.rule_table import Pick

_SPARE_PAGES = 64


@dataclass
class _Slot:
    """One request: float32 [L, Hkv, pages] sums, and the step they belong to."""

    generation: int
    length: int
    fresh: bool
    sums: torch.Tensor


class AttentionSums:
    """Sums of all slots that need them; a slot begins anew with every request.

    A request's steps make it longer by one token each. Sums of a slot whose generation changed, or
    whose length moved in any other way, belonged to another request or to a rewritten context.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.device = device
        self._slots: dict[int, _Slot] = {}

    def begin_step(
        self, picks: Sequence[Pick], lengths: Sequence[int], num_pages: Sequence[int]
    ) -> torch.Tensor:
        """Open a decode step, for all layers.

        Args:
            picks: the rows.
            lengths, num_pages: tokens and pages of each, the current token included.

        Returns:
            bool [R], rows without sums.
        """
        for pick, length, pages in zip(picks, lengths, num_pages, strict=True):
            slot = self._slots.get(pick.slot)
            if slot is None or (slot.generation, slot.length + 1) != (pick.generation, length):
                slot = self._slots[pick.slot] = _Slot(
                    pick.generation, length, True, self._blank(pages)
                )
            else:
                slot.length, slot.fresh = length, False
            missing = pages - slot.sums.shape[-1]
            if missing > 0:
                slot.sums = torch.cat([slot.sums, self._blank(missing)], -1)
        fresh = [self._slots[pick.slot].fresh for pick in picks]
        return torch.tensor(fresh, device=self.device)

    def _blank(self, pages: int) -> torch.Tensor:
        return torch.zeros(
            self.num_layers, self.num_kv_heads, pages + _SPARE_PAGES, device=self.device
        )

    def read(self, layer: int, picks: Sequence[Pick], max_pages: int) -> torch.Tensor:
        """Sums of the rows, float32 [R, Hkv, max_pages]."""
        out = torch.zeros(len(picks), self.num_kv_heads, max_pages, device=self.device)
        for row, pick in enumerate(picks):
            sums = self._slots[pick.slot].sums[layer, :, :max_pages]
            out[row, :, : sums.shape[-1]] = sums
        return out

    def add(
        self, layer: int, picks: Sequence[Pick], weights: torch.Tensor, windows: Sequence[int]
    ) -> None:
        """Account a step in one layer.

        Args:
            weights: float32 [R, Hkv, max_pages], attention weights of this step; 0 past a row's
                last page.
            windows: steps over which each row's sums reach back, at least 1.
        """
        for row, (pick, window) in enumerate(zip(picks, windows, strict=True)):
            sums = self._slots[pick.slot].sums[layer]
            count = min(sums.shape[-1], weights.shape[-1])
            sums *= 1 - 1 / window
            sums[:, :count] += weights[row, :, :count]


def page_weights(
    q: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    pages: torch.Tensor,
    attended: torch.Tensor,
    length: int,
    sm_scale: float,
) -> torch.Tensor:
    """Exact attention weights of one row's attended pages, summed over the heads of a group.

    Args:
        q: [Hq, D].
        keys: [physical pages, P, Hkv, D].
        lse: float32 [Hq], of everything attended.
        pages: int64 [n], physical page of each logical page.
        attended: bool [Hkv, n].
        length: tokens of the row.

    Returns:
        float32 [Hkv, n]; 0 for pages that were not attended.
    """
    heads, size = keys.shape[2], keys.shape[1]
    group = q.shape[0] // heads
    index = attended.any(0).nonzero().squeeze(1)
    token = index[:, None] * size + torch.arange(size, device=index.device)
    live = (token < length)[:, :, None, None]
    k = keys[pages[index]].float().masked_fill(~live, 0.0)
    logits = torch.einsum("hgd,kphd->hgkp", q.float().view(heads, group, -1), k) * sm_scale
    share = (logits - lse.view(heads, group, 1, 1)).masked_fill(~live[..., 0, 0], -torch.inf)
    weights = torch.zeros(attended.shape, device=attended.device)
    weights[:, index] = share.exp().sum((1, 3))
    return weights * attended
