"""The page tier on a CUDA device, in Triton: nothing waits for the host, nor for a load.

Frames lie on the device, records of all pages in pinned memory that kernels address directly. A
table on the device says where each page's record begins, in a frame or on the host, and the kernels
of progressive decode read it from there: a page without frame is read through the link, and comes
to a frame afterwards. Writes go to the host always and to the frame if there is one, so a frame can
be given up at any time; those of a prompt on a side stream, while the next layer computes. Over an
int8 host, whose records only full pages have, others are in frames that the device hands out itself
(`triton_open_pages.py`).

A step later than it was attended, the host learns what had no frame (`triton_state.py`), chooses
frames (`triton_frames.py`) and has it copied on a side stream (`triton_traffic.py`).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.page_tier.host_store import HostStore
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape
from sgl_psa_kernels.page_tier.tier import OP, PageTier
from sgl_psa_kernels.page_tier.triton_open_pages import OpenPages
from sgl_psa_kernels.page_tier.triton_places import Places
from sgl_psa_kernels.page_tier.triton_state import DeviceState
from sgl_psa_kernels.page_tier.triton_streams import Inline, Streams
from sgl_psa_kernels.page_tier.triton_traffic import Traffic
from sgl_psa_kernels.progressive_decode import triton_backend
from sgl_psa_kernels.progressive_decode.arguments import DecodeArguments
from sgl_psa_kernels.triton_support import interpreted, kernels, power_of_two

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
    - With an int8 host pages that are not full have frames that are set aside for them, half of
      all until :meth:`set_open_pages` says how many there can be. They count as hits, but
      ``tables`` do not name these frames. A page leaves its frame when it is full; one that
      finds none raises in a later step.
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
        self.state = DeviceState(shape, self._streams)
        filled, stamp = self.state.told
        self.tables = self.tables._replace(filled=filled, saved=filled, stamp=stamp)
        self.places = Places(shape, host, self._arena, self._streams, self._kernels)
        self.traffic = Traffic(shape, self.tables, self.places, self.state, self._streams, pipeline)
        if shape.int8_host:
            parts = self.traffic.book, self.places, self.state, self._streams, self._arena
            self.traffic.open_pages = OpenPages(shape, *parts)
            most = shape.num_layers * shape.num_pages
            self.traffic.open_pages.set_aside(min(shape.num_frames // 2, most))
        self._step = self._tokens_written = 0
        self._closed = False

    def _make_frames(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = (self.shape.num_frames, 2, *self.shape.page_shape)
        self._arena = torch.empty(size, dtype=self.shape.dtype, device=self._streams.device)
        return self._arena[:, 0], self._arena[:, 1]

    def _write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        module = kernels(OP, "page_tier.triton_kernels", slots, k, v, self.places[layer])
        self.traffic.settle(layer)
        self._tokens_written += len(slots)
        open_pages = self.traffic.open_pages
        if open_pages is not None:
            store = functools.partial(open_pages.write, layer, slots, k, v)
        else:
            store = functools.partial(self._store, module, layer, slots, k, v)
        self.traffic.writes.begin(layer, store, slots, k, v)

    def _store(
        self, module: ModuleType, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        heads, size, dim = self.shape.page_shape
        with torch.cuda.device_of(k):
            module.store[(len(slots),)](
                k, v, slots, self.k_frames, self.places[layer], self.places.origin,
                self.state.pages[0], layer, self.shape.num_pages, *k.stride()[:2], *v.stride()[:2],
                HKV=heads, HT=power_of_two(heads), D=dim, DT=power_of_two(dim),
                PAGE=size, RECORD=self.places.record,
            )  # fmt: skip

    def _gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None:
        self.traffic.settle(layer)
        heads, size, dim = self.shape.page_shape
        count = -(-tokens // size)
        if pages.device.type == "cpu":
            pages = self._streams.upload(pages[:count])
        module = kernels(OP, "page_tier.triton_kernels", pages, k_out, v_out, self.places[layer])
        part = max(1, min(size, 4096 // power_of_two(dim)))
        with torch.cuda.device_of(k_out):
            module.gather[(count, heads, size // part)](
                self._arena, self.places.codes, self.places[layer], pages, k_out, v_out,
                self.state.pages[0], self.state.numbers, layer, self.shape.num_pages, tokens,
                self.places.end, HKV=heads, D=dim, DT=power_of_two(dim), PAGE=size, PART=part,
                INT8=self.places.int8,
            )  # fmt: skip

    def _decode(
        self, layer: int, step: int, arguments: DecodeArguments, stats: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.traffic.settle(layer)
        if step != self._step:
            if self._streams.capturing():
                raise RuntimeError(
                    f"{OP}: a step over two tiers cannot be captured in a CUDA graph; "
                    "run decode without graphs"
                )
            self._step = step
            self.traffic.begin()
            self._require_open()
        q, page_table, seq_lens = arguments.q, arguments.page_table, arguments.seq_lens
        batch, width = page_table.shape
        heads, size, _ = self.shape.page_shape
        attended = arguments.attended
        if attended is None:
            attended = torch.empty(batch, heads, width, dtype=torch.uint8, device=q.device)
        out, lse, columns = triton_backend.progressive_decode(
            k_cache=self.k_frames,
            v_cache=self.v_frames,
            page_size=size,
            place=self.places[layer],
            codes=self.places.codes,
            **arguments._replace(attended=attended)._asdict(),
        )
        if batch * width:
            block = min(FOLD_PAGES, power_of_two(width, 16))
            with torch.cuda.device_of(q):
                self._kernels.fold[(batch, -(-width // block))](
                    attended, page_table, seq_lens, self.places[layer], *self.state.pages,
                    self.state.uses, self.state.numbers, layer, step, self.shape.num_pages,
                    self.shape.num_frames, page_table.stride(0), width, self.state.capacity,
                    HKV=heads, PAGE=size, FRAME=self.places.frame, BLOCK=block,
                )  # fmt: skip
        if layer == self.shape.num_layers - 1:
            self.traffic.look(step)
        return out, lse, columns if stats is None else stats.copy_(columns)

    def _release(self, pages: torch.Tensor) -> None:
        self.traffic.release(pages.cpu().unique())

    def prefetch(self, layer: int, pages: torch.Tensor) -> int:
        """Bring pages of a layer to frames before they are attended, as far as frames can be had;
        what the caller's stream is told next finds them there. Calls like :meth:`decode`.

        Args:
            pages: int64 [n] on the CPU; pages that have a frame may be among them.

        Returns:
            How many were brought.
        """
        self._layer(layer)
        self._pages(pages)
        self.traffic.settle()
        return self.traffic.prefetch(layer, pages, max(self._step, 1))

    def evict(self) -> None:
        """Take all frames from their pages, which stay on the host. Calls like :meth:`decode`."""
        self._require_open()
        self.traffic.evict()

    def clear(self) -> None:
        self.release(torch.arange(self.shape.num_pages))

    def _set_victims(self, order: torch.Tensor) -> None:
        self.traffic.book.set_order(order)

    def _set_quota(self, frames_per_layer: int) -> None:
        self.traffic.book.set_quota(frames_per_layer)

    @property
    def set_aside(self) -> int:
        return 0 if self.traffic.open_pages is None else self.traffic.open_pages.count

    def _set_open_pages(self, pages: int) -> None:
        assert self.traffic.open_pages is not None
        self.traffic.settle()
        self.traffic.open_pages.set_aside(self.shape.num_layers * pages)

    def drain(self) -> None:
        self._require_open()
        self.traffic.drain(self._step)
        self._require_open()

    def counters(self) -> TierCounters:
        size, traffic = self.shape.record_bytes, self.traffic
        token = size // self.shape.page_size
        return TierCounters(
            hits=traffic.hits,
            loads=traffic.loads,
            bytes_loaded=traffic.loads * size,
            bytes_saved=self._tokens_written * token,
            bytes_in_vain=traffic.book.in_vain * size,
            stall_ns=0,
            evictions=traffic.book.evictions,
            recycled=traffic.book.recycled,
            bytes_read_through=traffic.through * size // self.shape.num_kv_heads,
        )

    def misses(self, counters: TierCounters) -> int:
        """Each pair reads its own head through the link."""
        return counters.bytes_read_through * self.shape.num_kv_heads // self.shape.record_bytes

    def check(self) -> list[str]:
        self.drain()
        problems = self.tables.check(self.shape.page_size) + self.traffic.book.check()
        filled, open_pages = self.tables.filled, self.traffic.open_pages
        if open_pages is None:
            return problems + self.places.check(self.tables.frame_of, filled < 0)
        problems += self.places.check(self.tables.frame_of, open_pages.open(filled))
        return problems + open_pages.check(filled)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._streams.unpin(self.host)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{OP}: the tier is closed")
        if self.traffic.failure is not None:
            raise RuntimeError(self.traffic.failure)

    def _pages(self, pages: torch.Tensor) -> None:
        if pages.device.type == "cpu":
            super()._pages(pages)
        else:
            self._require_open()
