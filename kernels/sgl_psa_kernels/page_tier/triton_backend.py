"""The page tier on a CUDA device, in Triton: nothing waits for the host, nor for a load.

Frames lie on the device, records of all pages in pinned memory that kernels address directly. A
table on the device says where each page's record begins, in a frame or on the host, and the kernels
of progressive decode read it from there: a page without frame is read through the link, and comes
to a frame afterwards. Writes go to the host always and to the frame if there is one, so a frame can
be given up at any time.

A step later than it was attended, the host learns what had no frame (`triton_state.py`), chooses
frames (`triton_frames.py`) and starts one copy on a side stream (`triton_streams.py`). The order of
events, all on the caller's stream but the copy:

1. Places of pages that lose their frame are set to the host; kernels told later read them there.
2. Behind that point, the copy overwrites the frames. Nothing on the caller's stream reads them.
3. Once the host sees that the copy has ended, the places of the new pages are set to the frames.

A page that was not full may be written during such a copy: it is copied on the caller's stream.
"""

from __future__ import annotations

import math
from collections import deque

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.page_tier.host_store import HostStore
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape
from sgl_psa_kernels.page_tier.tier import OP, PageTier
from sgl_psa_kernels.page_tier.triton_frames import FrameBook
from sgl_psa_kernels.page_tier.triton_state import DeviceState, Seen
from sgl_psa_kernels.page_tier.triton_streams import Event, Inline, Streams
from sgl_psa_kernels.progressive_decode import triton_backend
from sgl_psa_kernels.triton_support import PLACE_UNIT, interpreted, kernels, power_of_two

#: Programs of a copy: enough bytes under way for the link, few multiprocessors.
COPY_PROGRAMS = 64
#: Elements that a program copies at a time.
COPY_BLOCK = 2048
#: Pages of a program that looks at what was attended.
FOLD_PAGES = 512


class TritonTier(PageTier):
    """See :class:`PageTier`. Differences, all because the host never waits:

    - Slots, and pages of :meth:`gather`, are not checked where they are on the device. A page has
      to be released before it is started anew.
    - Pages come to frames after they were attended; a write takes none.
    - ``tables`` show a step that is over, and change when the next one begins.
    - A page that held fewer tokens than were attended raises in a later step; the tier is of no use
      then.
    - Frames whose pages the last step attended are never taken: a working set beyond the arena is
      read through the link in part, and does not push itself out.
    - ``uses`` counts what was seen; ``loads`` nothing waits for, and ``stall_ns`` is 0.
    - Without ``pipeline`` the host waits for each step to end and copies on the caller's stream.

    ``write``, ``gather`` and ``decode`` are called on one CUDA stream, or ordered ones; the other
    methods on any. The host store is memory, and is pinned as a whole.

    Raises:
        ValueError: a host store that is a file.
        RuntimeError: no CUDA device, or memory that cannot be pinned.
    """

    def __init__(
        self,
        shape: TierShape,
        host: HostStore,
        pipeline: bool,
        streams: Streams | Inline | None = None,
    ) -> None:
        require(host.kind == "memory", f"{OP}: backend 'triton' needs a host store in memory")
        device = torch.device("cpu")
        if not interpreted() and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        # Raises where Triton cannot run, before anything is allocated.
        self._kernels = kernels(OP, "page_tier.triton_kernels", torch.empty(0, device=device))
        self._streams = streams or (Inline() if device.type == "cpu" else Streams(device))
        super().__init__(shape, host)
        self._streams.pin(host)
        self._state = DeviceState(shape, self._streams)
        filled, stamp = self._state.told
        self.tables = self.tables._replace(filled=filled, saved=filled, stamp=stamp)
        self.book = FrameBook(shape, self.tables)
        self._unit = PLACE_UNIT * shape.dtype.itemsize
        self._record = shape.record_bytes // self._unit
        distance = host.pointer - self.k_frames.data_ptr()
        require(distance % self._unit == 0, f"{OP}: the host store is not aligned")
        self._origin = distance // self._unit
        #: Rows of the places begin aligned, so that they need no kernels of their own.
        self._row = -(-shape.num_pages // 16) * 16
        home = torch.arange(shape.num_layers * shape.num_pages).view(shape.num_layers, -1)
        place = torch.zeros(shape.num_layers, self._row, dtype=torch.int64)
        place[:, : shape.num_pages] = self._origin + home * self._record
        self._place = place.to(device)
        self._origin_there = torch.tensor([self._origin], device=device)
        self._pipeline = pipeline
        self._step = self._epoch = 0
        self._look: Event | None = None
        #: Copies under way: their end, pages and frames.
        self._copies: deque[tuple[Event, torch.Tensor, torch.Tensor]] = deque()
        #: Released pages of which the device does not know yet, and the look that knows each.
        self._gone: list[torch.Tensor] = []
        self._released = torch.zeros(shape.num_pages, dtype=torch.int64)
        self._hits = self._through = self._loads = self._writes = 0
        self._failure: str | None = None
        self._closed = False

    def _make_frames(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = (self.shape.num_frames, 2, *self.shape.page_shape)
        arena = torch.empty(size, dtype=self.shape.dtype, device=self._streams.device)
        return arena[:, 0], arena[:, 1]

    # What the host does between two steps.

    def _set_places(self, keys: torch.Tensor, places: torch.Tensor) -> None:
        """Where the records of pages lie for what the caller's stream is told from now on."""
        if len(keys):
            keys = keys // self.shape.num_pages * self._row + keys % self.shape.num_pages
            keys, places = self._streams.upload(torch.stack([keys, places]))
            self._place.view(-1).scatter_(0, keys, places)

    def _home(self, keys: torch.Tensor) -> torch.Tensor:
        return self._origin + keys * self._record

    def _settle(self) -> None:
        """Tell the device of pages that were released."""
        if not self._gone:
            return
        gone = torch.cat(self._gone).unique()
        self._gone.clear()
        keys = (
            torch.arange(self.shape.num_layers)[:, None] * self.shape.num_pages + gone
        ).flatten()
        self._set_places(keys, self._home(keys))
        self._state.pages.index_fill_(2, self._streams.upload(gone), 0)

    def _adopt(self) -> None:
        """Pages whose copies have ended are in their frames."""
        while self._copies and self._copies[0][0].query():
            _, keys, frames = self._copies.popleft()
            alive = self.book.arrived(keys, frames)
            self._set_places(keys[alive], frames[alive] * self._record)

    def _see(self) -> Seen | None:
        """What the last look has seen, if the host knows by now."""
        if self._look is None or not self._look.query():
            return None
        self._look = None
        seen = self._state.read()
        self._hits += seen.hits
        self._through += seen.through
        # The look was before these were released.
        stale = self._released > self._epoch
        if bool(stale.any()):
            self._state.told[:, :, stale] = 0
        self.book.used(seen.uses)
        if seen.short is not None:
            layer, page = divmod(seen.short, self.shape.num_pages)
            self._failure = (
                f"{OP}: page {page} of layer {layer} held fewer tokens than were read of it in "
                f"step {seen.step} or before; what was answered since is wrong"
            )
        return seen

    def _begin(self) -> None:
        """Between two steps: pages that have come, and those that are to come."""
        if self._look is not None and not self._pipeline:
            self._look.synchronize()
        self._adopt()
        seen = self._see()
        self._require_open()
        if seen is None or not len(seen.keys):
            return
        listed, which = seen.keys.unique(return_inverse=True)
        full = torch.ones(len(listed), dtype=torch.bool)
        full[which[seen.open]] = False
        layers, pages = listed // self.shape.num_pages, listed % self.shape.num_pages
        # A page released since the list was begun: another look will tell what it is now.
        wanted = (self.tables.frame_of.view(-1)[listed] < 0) & (self._released[pages] < self._epoch)
        moves = [
            self.book.take(int(layer), listed[wanted & (layers == layer)], seen.step)
            for layer in layers[wanted].unique()
        ]
        if moves:
            keys, frames, lost = map(torch.cat, zip(*moves, strict=True))
            self._set_places(lost, self._home(lost))
            aside = full[torch.searchsorted(listed, keys)] & self._pipeline
            self._bring(keys[~aside], frames[~aside], aside=False)
            self._bring(keys[aside], frames[aside], aside=True)

    def _bring(self, keys: torch.Tensor, frames: torch.Tensor, aside: bool) -> None:
        if not len(keys):
            return
        self._loads += len(keys)

        chunks = -(-self._record * PLACE_UNIT // COPY_BLOCK)

        def copy() -> None:
            there, to = self._streams.upload(torch.stack([keys, frames]))
            self._kernels.bring[(min(COPY_PROGRAMS, len(keys) * chunks),)](
                self.k_frames, self._origin_there, there, to, len(keys),
                RECORD=self._record, CHUNKS=chunks, BLOCK=COPY_BLOCK,
            )  # fmt: skip

        if aside:
            self._copies.append((self._streams.aside(copy), keys, frames))
            return
        copy()
        self.book.arrived(keys, frames)
        self._set_places(keys, frames * self._record)

    # The operations.

    def _write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        module = kernels(OP, "page_tier.triton_kernels", slots, k, v, self._place)
        self._settle()
        self._writes += len(slots)
        heads, size, dim = self.shape.page_shape
        with torch.cuda.device_of(k):
            module.store[(len(slots),)](
                k, v, slots, self.k_frames, self._place[layer], self._origin_there,
                self._state.pages[0], layer, self.shape.num_pages, *k.stride()[:2], *v.stride()[:2],
                HKV=heads, HT=power_of_two(heads), D=dim, DT=power_of_two(dim),
                PAGE=size, RECORD=self._record,
            )  # fmt: skip

    def _gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None:
        self._settle()
        heads, size, dim = self.shape.page_shape
        count = -(-tokens // size)
        if pages.device.type == "cpu":
            pages = self._streams.upload(pages[:count])
        module = kernels(OP, "page_tier.triton_kernels", pages, k_out, v_out, self._place)
        part = max(1, min(size, 4096 // power_of_two(dim)))
        with torch.cuda.device_of(k_out):
            module.gather[(count, heads, size // part)](
                self.k_frames, self._place[layer], pages, k_out, v_out,
                self._state.pages[0], self._state.numbers, layer, self.shape.num_pages, tokens,
                HKV=heads, D=dim, DT=power_of_two(dim), PAGE=size, PART=part,
            )  # fmt: skip

    def _decode(
        self,
        layer: int,
        step: int,
        q: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        log_mass: torch.Tensor | None,
        *rule: torch.Tensor,
        attended: torch.Tensor | None,
        stats: torch.Tensor | None,
        sm_scale: float,
        sink_pages: int,
        recent_pages: int,
        group_pages: int,
        first_pages: torch.Tensor | None,
        kappa_start: torch.Tensor | None,
        residuals: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._settle()
        if step != self._step:
            self._step = step
            self._begin()
        batch, width = page_table.shape
        heads, size, _ = self.shape.page_shape
        if attended is None:
            attended = torch.empty(batch, heads, width, dtype=torch.uint8, device=q.device)
        out, lse, columns = triton_backend.progressive_decode(
            q, self.k_frames, self.v_frames, page_table, seq_lens, log_mass, *rule,
            page_size=size, sm_scale=sm_scale, sink_pages=sink_pages, recent_pages=recent_pages,
            group_pages=group_pages, first_pages=first_pages, attended=attended,
            kappa_start=kappa_start, residuals=residuals, place=self._place[layer],
        )  # fmt: skip
        if batch * width:
            block = min(FOLD_PAGES, power_of_two(width, 16))
            with torch.cuda.device_of(q):
                self._kernels.fold[(batch, -(-width // block))](
                    attended, page_table, seq_lens, self._place[layer], *self._state.pages,
                    self._state.uses, self._state.numbers, layer, step, self.shape.num_pages,
                    self.shape.num_frames, page_table.stride(0), width, self._state.capacity,
                    HKV=heads, PAGE=size, RECORD=self._record, BLOCK=block,
                )  # fmt: skip
        if layer == self.shape.num_layers - 1 and self._look is None:
            self._start_look()
        return out, lse, columns if stats is None else stats.copy_(columns)

    def _start_look(self) -> None:
        self._epoch += 1
        self._look = self._state.look(self._step)

    def _release(self, pages: torch.Tensor) -> None:
        pages = pages.cpu().unique()
        self.book.release(pages)
        self._released[pages] = self._epoch + 1
        self._state.told[:, :, pages] = 0
        self._gone.append(pages)

    def clear(self) -> None:
        self.release(torch.arange(self.shape.num_pages))

    def _set_victims(self, order: torch.Tensor) -> None:
        self.book.set_order(order)

    def _set_quota(self, frames_per_layer: int) -> None:
        self.book.set_quota(frames_per_layer)

    def drain(self) -> None:
        self._require_open()
        self._settle()
        for event, *_ in self._copies:
            event.synchronize()
        self._adopt()
        self._wait_for_look()
        self._start_look()
        self._wait_for_look()

    def _wait_for_look(self) -> None:
        if self._look is not None:
            self._look.synchronize()
        self._see()
        self._require_open()

    def counters(self) -> TierCounters:
        size = self.shape.record_bytes
        row = 2 * self.shape.num_kv_heads * self.shape.head_dim * self.shape.dtype.itemsize
        return TierCounters(
            hits=self._hits,
            loads=self._loads,
            bytes_loaded=self._loads * size,
            bytes_saved=self._writes * row,
            bytes_in_vain=self.book.in_vain * size,
            stall_ns=0,
            evictions=self.book.evictions,
            recycled=self.book.recycled,
            bytes_read_through=self._through * size // self.shape.num_kv_heads,
        )

    def check(self) -> list[str]:
        self.drain()
        problems = self.tables.check(self.shape.page_size) + self.book.check()
        keys = torch.arange(math.prod(self.tables.frame_of.shape))
        frames = self.tables.frame_of.flatten().long()
        want = torch.where(frames >= 0, frames * self._record, self._home(keys))
        if not torch.equal(self._place[:, : self.shape.num_pages].cpu().flatten(), want):
            problems.append("places on the device are not those of the tables")
        return problems

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._streams.unpin(self.host)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{OP}: the tier is closed")
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _pages(self, pages: torch.Tensor) -> None:
        if pages.device.type == "cpu":
            super()._pages(pages)
        else:
            self._require_open()
