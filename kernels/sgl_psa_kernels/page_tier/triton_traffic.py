"""What moves between host and frames of a page tier, a step after it was attended.

The order of events, all on the caller's stream but the copy:

1. Places of pages that lose their frame are set to the host; kernels told later read them there.
2. Behind that point, the copy overwrites the frames. Nothing on the caller's stream reads them.
3. Once the host sees that the copy has ended, the places of the new pages are set to the frames.

Writes of prompts go beside, too (``triton_writes.py``); places change only behind them.

A page that was not full may be written during such a copy: it is copied on the caller's stream.
Under an int8 host it is never copied (``triton_open_pages.py``).
"""

from __future__ import annotations

from collections import deque

import torch

from sgl_psa_kernels.page_tier.shape import TierShape, TierTables
from sgl_psa_kernels.page_tier.tier import no_frame
from sgl_psa_kernels.page_tier.triton_frames import FrameBook
from sgl_psa_kernels.page_tier.triton_open_pages import OpenPages
from sgl_psa_kernels.page_tier.triton_places import Places
from sgl_psa_kernels.page_tier.triton_state import DeviceState, Seen
from sgl_psa_kernels.page_tier.triton_streams import Event, Inline, Streams
from sgl_psa_kernels.page_tier.triton_writes import Writes


class Traffic:
    """Looks at what was attended, and the copies that follow.

    Attributes:
        book: who has which frame.
        writes: those under way.
        open_pages: those of an int8 host, or None.
        hits, through: (row, KV head) pairs that attended pages in frames, and on the host.
        loads: pages brought to frames.
        failure: None, or why what was answered is wrong.
    """

    def __init__(
        self,
        shape: TierShape,
        tables: TierTables,
        places: Places,
        state: DeviceState,
        streams: Streams | Inline,
        pipeline: bool,
    ) -> None:
        self._shape, self._tables, self._places = shape, tables, places
        self._state, self._streams, self._pipeline = state, streams, pipeline
        self.book = FrameBook(shape, tables)
        self.writes = Writes(streams)
        self.hits = self.through = self.loads = 0
        self.open_pages: OpenPages | None = None
        self.failure: str | None = None
        self._look: Event | None = None
        #: Copies under way: their end, pages and frames.
        self._copies: deque[tuple[Event, torch.Tensor, torch.Tensor]] = deque()
        #: Released pages that the device does not know of yet.
        self._gone: list[torch.Tensor] = []
        #: Number of the last look, and of the first one after each page's last release.
        self._epoch = 0
        self._released = torch.zeros(shape.num_pages, dtype=torch.int64)

    def release(self, pages: torch.Tensor) -> None:
        """Pages int64 [n] hold nothing; the device is told by :meth:`settle`."""
        self.book.release(pages)
        self._released[pages] = self._epoch + 1
        self._state.told[:, :, pages] = 0
        self._gone.append(pages)

    def settle(self, layer: int | None = None) -> None:
        """What the device is told next of ``layer``, or of any, comes after its writes, and after
        it knows of pages that were released."""
        self.writes.settle(None if self._gone else layer)
        if not self._gone:
            return
        gone = torch.cat(self._gone).unique()
        self._gone.clear()
        first = torch.arange(self._shape.num_layers) * self._shape.num_pages
        there = self._streams.upload(gone)
        if self.open_pages is not None:
            self.open_pages.release(there)
        self._places.move((first[:, None] + gone).flatten(), None)
        self._state.pages.index_fill_(2, there, 0)

    def look(self, step: int) -> None:
        """At the end of a step: have the host told of it, unless it still waits for the last."""
        if self._look is None:
            self._epoch += 1
            self._look = self._state.look(step)

    def begin(self) -> None:
        """Between two steps: pages whose copies have ended, and those that are to come."""
        self.writes.settle()
        if self._look is not None and not self._pipeline:
            self._look.synchronize()
        self._adopt()
        seen = self._see()
        if seen is not None and len(seen.keys) and self.failure is None:
            self._answer(seen)

    def _adopt(self) -> None:
        while self._copies and self._copies[0][0].query():
            _, keys, frames = self._copies.popleft()
            alive = self.book.arrived(keys, frames)
            self._places.move(keys[alive], frames[alive])

    def _see(self) -> Seen | None:
        """What the last look has seen, if the host knows by now."""
        if self._look is None or not self._look.query():
            return None
        self._look = None
        seen = self._state.read()
        self.hits += seen.hits
        self.through += seen.through
        # The look was before these were released.
        stale = self._released > self._epoch
        if bool(stale.any()):
            self._state.told[:, :, stale] = 0
        self.book.used(seen.uses)
        if seen.short is not None:
            layer, page = divmod(seen.short, self._shape.num_pages)
            self.failure = (
                f"page_tier: page {page} of layer {layer} held fewer tokens than were read of it "
                f"in step {seen.step} or before; what was answered since is wrong"
            )
        if seen.lacked is not None and self.open_pages is not None:
            layer = seen.lacked // self._shape.num_pages
            self.failure = (
                f"{no_frame(layer, self.open_pages.count)}; what was answered in step {seen.step}, "
                "perhaps before, and since is wrong"
            )
        return seen

    def _answer(self, seen: Seen) -> None:
        """Bring the pages that were attended on the host."""
        listed, which = seen.keys.unique(return_inverse=True)
        full = torch.ones(len(listed), dtype=torch.bool)
        full[which[seen.open]] = False
        layers, pages = listed // self._shape.num_pages, listed % self._shape.num_pages
        # A page released since the list was begun: another look will tell what it is now.
        wanted = self._tables.frame_of.view(-1)[listed] < 0
        wanted &= self._released[pages] < self._epoch
        moves = [
            self.book.take(int(layer), listed[wanted & (layers == layer)], seen.step)
            for layer in layers[wanted].unique()
        ]
        if moves:
            keys, frames, lost = map(torch.cat, zip(*moves, strict=True))
            self._places.move(lost, None)
            aside = full[torch.searchsorted(listed, keys)] & self._pipeline
            self._bring(keys[~aside], frames[~aside], aside=False)
            self._bring(keys[aside], frames[aside], aside=True)

    def _bring(self, keys: torch.Tensor, frames: torch.Tensor, aside: bool) -> None:
        if not len(keys):
            return
        self.loads += len(keys)
        if aside:
            end = self._streams.aside(lambda: self._places.copy(keys, frames))
            self._copies.append((end, keys, frames))
            return
        self._places.copy(keys, frames)
        self.book.arrived(keys, frames)
        self._places.move(keys, frames)

    def prefetch(self, layer: int, pages: torch.Tensor, step: int) -> int:
        """Bring pages of a layer on the current stream; returns how many were."""
        keys = layer * self._shape.num_pages + pages.unique()
        keys = keys[self._tables.frame_of.view(-1)[keys] < 0]
        if self.open_pages is not None:
            keys = keys[self._tables.filled.view(-1)[keys] == self._shape.page_size]
        keys, frames, lost = self.book.take(layer, keys, step)
        self._places.move(lost, None)
        self._bring(keys, frames, aside=False)
        return len(keys)

    def evict(self) -> None:
        """Take all frames from their pages."""
        self.drain(1)
        self._places.move(self.book.evict_all(), None)

    def drain(self, step: int) -> None:
        """Wait for copies and looks, and have the tables told as they are now."""
        self.settle()
        for end, *_ in self._copies:
            end.synchronize()
        self._adopt()
        for again in (True, False):
            if self._look is not None:
                self._look.synchronize()
                self._see()
            if again:
                self.look(step)
