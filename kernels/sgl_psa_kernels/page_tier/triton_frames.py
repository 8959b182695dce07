"""Who has which frame, of a tier that brings pages after they were attended: the host's books."""

from __future__ import annotations

import torch

from sgl_psa_kernels.page_tier.shape import ASIDE, TierShape, TierTables


class FrameBook:
    """Frames of pages, the free ones, and the order in which others are taken.

    A frame is free, or in ``tables.owner``, or lost: its page was released while it was on its way,
    and the frame waits for the end of the copy; or it is set aside for pages that are not full. All
    pages are named by key, layer * P + page.

    Attributes:
        evictions, recycled: as in ``TierCounters``.
        in_vain: frames that were given up before any head attended their page.
    """

    def __init__(self, shape: TierShape, tables: TierTables) -> None:
        self._shape, self._tables = shape, tables
        self._free = list(range(shape.num_frames))
        self._held = torch.zeros(shape.num_layers, dtype=torch.int64)
        self._unused = torch.zeros(shape.num_frames, dtype=torch.bool)
        self._order = torch.empty(1, 0, dtype=torch.int64)
        self._quota = shape.num_frames
        self._hand = self._came = 0
        self.evictions = self.recycled = self.in_vain = 0

    def set_order(self, order: torch.Tensor) -> None:
        """See :meth:`PageTier.set_victims`; a frame that a row names twice counts where it comes
        first."""
        self._order = torch.full(order.shape, -1, dtype=torch.int64)
        for row, frames in enumerate(order.long()):
            names, which = frames.unique(return_inverse=True)
            place = torch.full(names.shape, len(frames))
            place.scatter_reduce_(0, which, torch.arange(len(frames)), "amin")
            self._order[row, place] = names

    def set_quota(self, frames: int) -> None:
        """See :meth:`PageTier.set_quota`."""
        self._quota = frames

    def set_aside(self, count: int) -> list[int]:
        """So many free frames are another's to give, and no page of this book gets them.

        Raises:
            RuntimeError: there are fewer.
        """
        if count > len(self._free):
            raise RuntimeError(
                f"page_tier: {count} more frames are to be set aside for open pages, and "
                f"{len(self._free)} are free; set them aside before pages are attended"
            )
        split = len(self._free) - count
        frames = self._free[split:]
        del self._free[split:]
        self._tables.owner[frames] = ASIDE
        return frames

    def take_back(self, frames: list[int]) -> None:
        """Frames that were set aside are free."""
        self._tables.owner[frames] = -1
        self._free += frames

    def aside(self) -> torch.Tensor:
        """int64 [n], frames that are set aside, in order."""
        return torch.nonzero(self._tables.owner == ASIDE).flatten()

    def used(self, uses: torch.Tensor) -> None:
        """Add uses int32 [F] to those of the frames' pages."""
        self._tables.uses.add_(uses * (self._tables.owner >= 0))
        self._unused &= uses == 0

    def take(
        self, layer: int, keys: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Frames for pages ``keys`` int64 [n] of a layer that have none.

        Pages that were attended in ``step`` or later keep theirs: where nothing else is left, pages
        get none, and a working set larger than the arena does not push itself out.

        Returns:
            The first keys, their frames (busy from now on), and the keys that lost theirs.
        """
        room = self._quota - int(self._held[layer])
        count = min(len(keys), max(room, 0), len(self._free))
        split = len(self._free) - count
        frames = [torch.tensor(self._free[split:], dtype=torch.int64)]
        del self._free[split:]
        missing, room = len(keys) - count, room - count
        lost = [keys[:0]]
        for recycled in (False, True):
            if missing:
                candidates = self._rotation(missing) if recycled else self._victims(layer)
                usable, foreign = self._usable(candidates, layer, room, step)
                victims = usable[:missing]
                lost.append(self._evict(victims))
                frames.append(victims)
                missing, room = missing - len(victims), room - int(foreign[:missing].sum())
                if recycled and len(victims):
                    self.recycled += len(victims)
                    self._hand = (int(victims[-1]) + 1) % self._shape.num_frames
        taken = torch.cat(frames)
        keys = keys[: len(taken)]
        self._enter(layer, keys, taken)
        return keys, taken, torch.cat(lost)

    def _victims(self, layer: int) -> torch.Tensor:
        order = self._order[layer % len(self._order)]
        return order[order >= 0]

    def _rotation(self, missing: int) -> torch.Tensor:
        """Frames from the hand on; not all of a large arena for a few pages."""
        count = min(self._shape.num_frames, 4 * missing + 256)
        return (self._hand + torch.arange(count)) % self._shape.num_frames

    def _usable(
        self, candidates: torch.Tensor, layer: int, room: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the candidates that may be taken, and which of them are of other layers."""
        owner = self._tables.owner[candidates]
        stamp = self._tables.stamp.flatten()[owner.clamp(min=0)]
        usable = (owner >= 0) & (self._tables.busy[candidates] == 0) & (stamp < step)
        foreign = usable & (owner // self._shape.num_pages != layer)
        usable &= ~foreign | (foreign.cumsum(0) <= room)
        return candidates[usable], foreign[usable]

    def evict_all(self) -> torch.Tensor:
        """All frames become free, when no copy is under way; returns the keys that lost theirs."""
        frames = torch.nonzero(self._tables.owner >= 0).flatten()
        self._free += frames.tolist()
        return self._evict(frames)

    def _evict(self, frames: torch.Tensor) -> torch.Tensor:
        keys = self._tables.owner[frames]
        self._leave(frames, keys)
        self.evictions += len(frames)
        return keys

    def _leave(self, frames: torch.Tensor, keys: torch.Tensor) -> None:
        self._tables.frame_of.view(-1)[keys] = -1
        self._tables.owner[frames] = -1
        self._tables.uses[frames] = 0
        self._held -= torch.bincount(keys // self._shape.num_pages, minlength=len(self._held))
        self.in_vain += int(self._unused[frames].sum())
        self._unused[frames] = False

    def _enter(self, layer: int, keys: torch.Tensor, frames: torch.Tensor) -> None:
        count = len(keys)
        self._tables.frame_of.view(-1)[keys] = frames.to(torch.int32)
        self._tables.owner[frames] = keys
        self._tables.came[frames] = self._came + 1 + torch.arange(count)
        self._tables.busy[frames] = 1
        self._unused[frames] = True
        self._came += count
        self._held[layer] += count

    def arrived(self, keys: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The copies of ``keys`` to ``frames`` are whole. Returns which of the pages are still
        theirs, bool [n]; the frames of the others are free."""
        self._tables.busy[frames] = 0
        alive = self._tables.owner[frames] == keys
        self._free += frames[~alive].tolist()
        return alive

    def release(self, pages: torch.Tensor) -> torch.Tensor:
        """The pages leave their frames in all layers. Returns their keys; a frame that its page is
        still on the way to is free once that has arrived."""
        frames = self._tables.frame_of[:, pages]
        frames = frames[frames >= 0].long().unique()
        keys = self._tables.owner[frames]
        self._leave(frames, keys)
        self._free += frames[self._tables.busy[frames] == 0].tolist()
        return keys

    def check(self) -> list[str]:
        """What contradicts itself when nothing is on its way."""
        problems = []
        owner = self._tables.owner
        if sorted(self._free) != torch.nonzero(owner == -1).flatten().tolist():
            problems.append("the free list is not that of the frames without owner")
        held = (self._tables.frame_of >= 0).sum(1)
        if not torch.equal(self._held, held):
            problems.append("layers do not hold as many frames as they are counted")
        return problems
