"""The page tier in plain torch, without a thread: the specification of tables and results."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.page_tier import codec
from sgl_psa_kernels.page_tier.host_store import HostStore, HostStoreError
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape
from sgl_psa_kernels.page_tier.tier import OP, PageTier, no_frame
from sgl_psa_kernels.progressive_decode.arguments import DecodeArguments
from sgl_psa_kernels.progressive_decode.reference import progressive_decode


class ReferenceTier(PageTier):
    """See :class:`PageTier`."""

    def __init__(self, shape: TierShape, host: HostStore, pipeline: bool) -> None:
        super().__init__(shape, host)
        self._free = list(range(shape.num_frames))
        self._quota = shape.num_frames
        self._order = torch.empty(1, 0, dtype=torch.int32)
        self._attended: set[int] = set()  # frames attended since the order was set
        self._unused: set[int] = set()  # frames that were loaded and not attended yet
        self._hand = self._came = 0
        self._count = dict.fromkeys(TierCounters._fields, 0)
        self._failure: HostStoreError | None = None
        self._closed = False

    # Frames and the host.

    def _pages_of(self, frame: int) -> tuple[int, int]:
        """(layer, page) in a frame that is not free."""
        layer, page = divmod(int(self.tables.owner[frame]), self.shape.num_pages)
        return layer, page

    def _offset(self, layer: int, page: int) -> int:
        return (layer * self.shape.num_pages + page) * self.shape.record_bytes

    def _save(self, layer: int, page: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.shape.int8_host:
            record = codec.encode(k, v)
        else:
            record = torch.stack([k, v]).view(torch.uint8).flatten()
        try:
            self.host.write(self._offset(layer, page), record)
        except HostStoreError as error:
            self._failure = error
            raise
        self._count["bytes_saved"] += self.shape.record_bytes
        self.tables.saved[layer, page] = self.tables.filled[layer, page]

    def _save_frame(self, layer: int, page: int) -> None:
        frame = int(self.tables.frame_of[layer, page])
        self._save(layer, page, self.k_frames[frame], self.v_frames[frame])
        self.tables.busy[frame] = 0

    def _record(self, layer: int, page: int) -> torch.Tensor:
        """[2, Hkv, page_size, D], from the frame or the host."""
        frame = int(self.tables.frame_of[layer, page])
        if frame >= 0:
            return torch.stack([self.k_frames[frame], self.v_frames[frame]])
        try:
            data = self.host.read(self._offset(layer, page), self.shape.record_bytes)
        except HostStoreError as error:
            self._failure = error
            raise
        if self.shape.int8_host:
            return codec.decode(data, self.shape)
        return data.view(self.shape.dtype).view(2, *self.shape.page_shape)

    def _round(self, frame: int) -> None:
        """A page that is full says in its frame what the host will."""
        page = self.k_frames[frame], self.v_frames[frame]
        self.k_frames[frame], self.v_frames[frame] = codec.decode(codec.encode(*page), self.shape)

    def _open_frames(self) -> torch.Tensor:
        """int64 [n], frames of pages that are not full."""
        used = torch.nonzero(self.tables.owner >= 0).flatten()
        filled = self.tables.filled.flatten()[self.tables.owner[used]]
        return used[filled < self.shape.page_size]

    def _require_frames(self, layer: int) -> None:
        """An int8 host's open pages leave frames for a block of pages of the layer."""
        frames = self._open_frames()
        own = int((self.tables.owner[frames] // self.shape.num_pages == layer).sum())
        room = min(self.shape.num_frames - len(frames), self._quota - own)
        if room < self.shape.block_pages:
            raise RuntimeError(no_frame(layer, len(frames)))

    def _allowed(self, frame: int, layer: int) -> bool:
        """Whether the layer may take the frame: a layer at its quota takes only its own."""
        owner = int(self.tables.owner[frame])
        if owner < 0 or self._held(layer) < self._quota:
            return True
        return owner // self.shape.num_pages == layer

    def _held(self, layer: int) -> int:
        return int((self.tables.frame_of[layer] >= 0).sum())

    def _free_frame(self, layer: int) -> int:
        """A free frame that the layer may have, or -1."""
        return self._free.pop() if self._free and self._held(layer) < self._quota else -1

    def _take_frame(self, layer: int) -> int:
        """A frame for the layer, from another page if need be."""
        frame = self._free_frame(layer)
        if frame >= 0:
            return frame
        for victim in self._order[layer % len(self._order)].tolist():
            owned = victim >= 0 and int(self.tables.owner[victim]) >= 0
            clean = owned and not self.tables.busy[victim] and victim not in self._attended
            if clean and self._allowed(victim, layer):
                return self._evict(victim)
        # In rotation: what is clean and was not attended, what is clean, anything.
        passes = [(False, False), (True, False), (True, True)]
        if self.shape.int8_host:  # what is dirty is not full
            passes.pop()
        for attended, dirty in passes:
            for _ in range(self.shape.num_frames):
                victim = self._hand
                self._hand = (victim + 1) % self.shape.num_frames
                owned = int(self.tables.owner[victim]) >= 0
                usable = owned and self._allowed(victim, layer)
                usable &= attended or victim not in self._attended
                if usable and (dirty or not self.tables.busy[victim]):
                    self._count["recycled"] += 1
                    return self._evict(victim)
        raise RuntimeError(no_frame(layer, len(self._open_frames())))

    def _evict(self, frame: int) -> int:
        layer, page = self._pages_of(frame)
        if self.tables.saved[layer, page] < self.tables.filled[layer, page]:
            self._save_frame(layer, page)
        self._count["evictions"] += 1
        self._leave(frame)
        return frame

    def _leave(self, frame: int) -> None:
        """The frame's page is without frame; the frame is not on the free list yet."""
        layer, page = self._pages_of(frame)
        if frame in self._unused:
            self._count["bytes_in_vain"] += self.shape.record_bytes
        self._unused.discard(frame)
        self._attended.discard(frame)
        self.tables.frame_of[layer, page] = -1
        self.tables.owner[frame] = -1
        self.tables.uses[frame] = self.tables.busy[frame] = 0

    def _enter(self, layer: int, page: int, frame: int) -> None:
        self._came += 1
        self.tables.frame_of[layer, page] = frame
        self.tables.owner[frame] = layer * self.shape.num_pages + page
        self.tables.came[frame] = self._came
        self.tables.uses[frame] = self.tables.busy[frame] = 0

    def _load(self, layer: int, page: int) -> None:
        """Bring the page to a frame."""
        record = self._record(layer, page)
        frame = self._take_frame(layer)
        self._enter(layer, page, frame)
        self.k_frames[frame], self.v_frames[frame] = record[0], record[1]
        self._count["loads"] += 1
        self._count["bytes_loaded"] += self.shape.record_bytes

    # The operations.

    def _write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        parts = page_parts(self, layer, slots)
        for page, start, tokens in parts:
            if start == 0:
                self._forget(layer, page)
            end = start + len(tokens)
            full = end == self.shape.page_size
            if start == 0 and full:
                frame = self._free_frame(layer)
            elif (frame := int(self.tables.frame_of[layer, page])) < 0:
                if start:
                    self._load(layer, page)
                    frame = int(self.tables.frame_of[layer, page])
                else:
                    frame = self._take_frame(layer)
            if start == 0 and frame >= 0:
                self._enter(layer, page, frame)
            self.tables.filled[layer, page] = end
            index = torch.tensor(tokens)
            new_k, new_v = k[index].movedim(0, 1), v[index].movedim(0, 1)
            if frame < 0:
                self._save(layer, page, new_k, new_v)
                continue
            self.k_frames[frame][:, start:end] = new_k
            self.v_frames[frame][:, start:end] = new_v
            self.tables.busy[frame] = 1
            if full and self.shape.int8_host:
                self._round(frame)
            if full:
                self._save_frame(layer, page)

    def _gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None:
        size = self.shape.page_size
        for at, page in zip(range(0, tokens, size), pages.tolist(), strict=False):
            count = min(size, tokens - at)
            self._require_tokens(layer, page, count)
            record = self._record(layer, page)[:, :, :count].movedim(1, 2)
            k_out[at : at + count], v_out[at : at + count] = record[0], record[1]

    def _require_tokens(self, layer: int, page: int, count: int) -> None:
        filled = int(self.tables.filled[layer, page])
        if filled < count:
            raise RuntimeError(
                f"{OP}: page {page} of layer {layer} holds {filled} tokens, {count} are asked for"
            )

    def _decode(
        self, layer: int, step: int, arguments: DecodeArguments, stats: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape, page_table, seq_lens = self.shape, arguments.page_table, arguments.seq_lens
        if shape.int8_host:
            self._require_frames(layer)
        slots = (shape.num_pages * shape.page_size, shape.num_kv_heads, shape.head_dim)
        cache = torch.full((2, *slots), float("nan"), dtype=shape.dtype)
        in_use = {
            int(page)
            for row, length in zip(page_table, seq_lens.tolist(), strict=True)
            for page in row[: -(-max(length, 0) // shape.page_size)]
            if 0 <= page < shape.num_pages
        }
        for page in in_use:
            first = page * shape.page_size
            filled = int(self.tables.filled[layer, page])
            if filled:
                record = self._record(layer, page)[:, :, :filled]
                cache[:, first : first + filled] = record.movedim(1, 2)
        attended = arguments.attended
        if attended is None:
            size = (len(page_table), shape.num_kv_heads, page_table.shape[1])
            attended = torch.empty(size, dtype=torch.uint8)
        out, lse, columns = progressive_decode(
            k_cache=cache[0],
            v_cache=cache[1],
            page_size=shape.page_size,
            **arguments._replace(attended=attended)._asdict(),
        )
        for row, _, place in torch.nonzero(attended).tolist():
            page = int(page_table[row, place])
            tokens = min(shape.page_size, int(seq_lens[row]) - place * shape.page_size)
            self._require_tokens(layer, page, tokens)
            self._touch(layer, page, step)
        if stats is not None:
            columns = stats.copy_(columns)
        return out, lse, columns

    def _touch(self, layer: int, page: int, step: int) -> None:
        """A head attends the page."""
        if int(self.tables.frame_of[layer, page]) < 0:
            self._load(layer, page)
        else:
            self._count["hits"] += 1
        frame = int(self.tables.frame_of[layer, page])
        self._attended.add(frame)
        self.tables.stamp[layer, page] = step
        self.tables.uses[frame] += 1

    def _forget(self, layer: int, page: int) -> None:
        """The page of the layer holds nothing."""
        frame = int(self.tables.frame_of[layer, page])
        if frame >= 0:
            self._leave(frame)
            self._free.append(frame)
        for table in (self.tables.saved, self.tables.filled, self.tables.stamp):
            table[layer, page] = 0

    def _release(self, pages: torch.Tensor) -> None:
        for page in pages.tolist():
            for layer in range(self.shape.num_layers):
                self._forget(layer, page)

    def clear(self) -> None:
        self._release(torch.arange(self.shape.num_pages))

    def _set_victims(self, order: torch.Tensor) -> None:
        self._order = order.clone()
        self._attended.clear()

    def _set_quota(self, frames_per_layer: int) -> None:
        self._quota = frames_per_layer

    def drain(self) -> None:
        self._require_open()

    def counters(self) -> TierCounters:
        return TierCounters(**self._count)

    def check(self) -> list[str]:
        self._require_open()
        problems = self.tables.check(self.shape.page_size)
        free = torch.nonzero(self.tables.owner < 0).flatten().tolist()
        if sorted(self._free) != free:
            problems.append("the free list is not that of the frames without owner")
        return problems

    def close(self) -> None:
        self._closed = True

    def _require_open(self) -> None:
        if self._failure is not None:
            raise HostStoreError(str(self._failure))
        if self._closed:
            raise RuntimeError(f"{OP}: the tier is closed")


def page_parts(tier: PageTier, layer: int, slots: torch.Tensor) -> list[tuple[int, int, list[int]]]:
    """(page, first offset, indices into slots) of what a write adds to each page, in order.

    Raises:
        ValueError: a slot outside of the tier, or one that its page is not filled up to.
    """
    size, pages = tier.shape.page_size, tier.shape.num_pages
    parts: list[tuple[int, int, list[int]]] = []
    latest: dict[int, tuple[int, int, list[int]]] = {}
    for i, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, size)
        checks.require(0 <= page < pages, f"{OP}: slots[{i}] = {slot} lies outside of the tier")
        part = latest.get(page)
        filled = part[1] + len(part[2]) if part else int(tier.tables.filled[layer, page])
        checks.require(
            offset in (0, filled),
            f"{OP}: slots[{i}] = {slot} is token {offset} of page {page}, which holds {filled}",
        )
        if part is None or offset == 0:
            part = (page, offset, [])
            parts.append(part)
            latest[page] = part
        part[2].append(i)
    return parts
