"""Layout of the numbers int64 that kernels of a page tier tell the host, and its pinned copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_psa_kernels.page_tier.shape import TierShape
from sgl_psa_kernels.page_tier.triton_streams import Event, Inline, Streams

#: Pages attended in frames and on the host, by (row, KV head) pairs; 1 + key of a page that held
#: fewer tokens than were attended, and of an open one that found no frame; how many pages were to
#: be listed; the list begins at LIST.
HITS, THROUGH, SHORT, LACKED, MISSED, LIST = range(6)

#: Most pages that one look lists; those behind them are listed when they are attended again.
LISTED = 8192


@dataclass(frozen=True)
class Seen:
    """What was attended between two looks.

    Attributes:
        step: the last decode step in it.
        hits, through: (row, KV head) pairs.
        short, lacked: None, or layer * P + page of a page that was too short, or that was not full
            and found no frame under an int8 host.
        keys: int64 [n], layer * P + page of pages without frame, in any order, perhaps repeated.
        open: bool [n], whether the page was not full then.
        uses: int32 [F], (row, KV head) pairs that attended each frame.
    """

    step: int
    hits: int
    through: int
    short: int | None
    lacked: int | None
    keys: torch.Tensor
    open: torch.Tensor
    uses: torch.Tensor


class DeviceState:
    """Tables that kernels keep, and their way to the host.

    Attributes:
        pages: int32 [2, L, P] on the device: tokens filled, step of the last attention.
        uses: int32 [F], numbers: int64 [LIST + capacity], both since the last look.
        told: pinned int32 [2, L, P], ``pages`` as of the last look.
    """

    def __init__(self, shape: TierShape, streams: Streams | Inline) -> None:
        self._streams = streams
        self.capacity = min(LISTED, shape.num_layers * shape.num_pages)
        pages = (2, shape.num_layers, shape.num_pages)
        options = {"device": streams.device}
        self.pages = torch.zeros(pages, dtype=torch.int32, **options)
        self.uses = torch.zeros(shape.num_frames, dtype=torch.int32, **options)
        self.numbers = torch.zeros(LIST + self.capacity, dtype=torch.int64, **options)
        self._uses, self._numbers = self.uses.clone(), self.numbers.clone()
        self.told = streams.pinned(*pages, dtype=torch.int32)
        self._told_uses = streams.pinned(shape.num_frames, dtype=torch.int32)
        self._told_numbers = streams.pinned(LIST + self.capacity, dtype=torch.int64)
        self._step = 0

    def look(self, step: int) -> Event:
        """Send all to the host; the last look must have been read."""
        self._step = step
        self._uses.copy_(self.uses)
        self._numbers.copy_(self.numbers)
        self.uses.zero_()
        self.numbers.zero_()
        return self._streams.aside(self._fetch)

    def _fetch(self) -> None:
        self.told.copy_(self.pages, non_blocking=True)
        self._told_uses.copy_(self._uses, non_blocking=True)
        self._told_numbers.copy_(self._numbers, non_blocking=True)

    def read(self) -> Seen:
        """What a look whose event has passed has seen."""
        hits, through, short, lacked, missed = self._told_numbers[:LIST].tolist()
        entries = self._told_numbers[LIST : LIST + min(missed, self.capacity)]
        return Seen(
            self._step,
            hits,
            through,
            short - 1 if short else None,
            lacked - 1 if lacked else None,
            entries >> 1,
            (entries & 1).bool(),
            self._told_uses,
        )
