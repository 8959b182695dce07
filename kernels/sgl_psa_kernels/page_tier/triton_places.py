"""Where records of pages lie, as kernels see it: one table over frames and host."""

from __future__ import annotations

from types import ModuleType

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.page_tier.host_store import HostStore
from sgl_psa_kernels.page_tier.shape import TierShape
from sgl_psa_kernels.page_tier.triton_streams import Inline, Streams
from sgl_psa_kernels.triton_support import PLACE_UNIT, power_of_two

#: Programs of a copy: enough bytes under way for the link, few multiprocessors.
COPY_PROGRAMS = 64
#: Elements that a program copies at a time.
COPY_BLOCK = 2048


class Places:
    """The table, and copies of records from the host to frames. Pages are named by key,
    layer * P + page; a place counts units of ``PLACE_UNIT`` elements from the first frame.

    Attributes:
        frame, record: units of a frame, and of a record on the host; frame f lies at f * frame.
        end: units of all frames; a place within 0..end is one of theirs.
        codes: the bytes of all frames, int8, where the host is in int8, or None.
        int8: bytes of a unit there, or 0.
        origin: int64 [1] on the device, place of page 0 of layer 0 on the host.
    """

    def __init__(
        self,
        shape: TierShape,
        host: HostStore,
        arena: torch.Tensor,
        streams: Streams | Inline,
        module: ModuleType,
    ) -> None:
        self._shape, self._arena, self._streams, self._module = shape, arena, streams, module
        unit = PLACE_UNIT * shape.dtype.itemsize
        self.frame, self.record = shape.frame_bytes // unit, shape.record_bytes // unit
        self.end = shape.num_frames * self.frame
        self.int8 = unit if shape.int8_host else 0
        self.codes = arena.view(torch.int8).flatten() if shape.int8_host else None
        distance = host.pointer - arena.data_ptr()
        require(distance % unit == 0, f"page_tier: the host store is not aligned to {unit} bytes")
        self._origin = distance // unit
        # Rows begin aligned, so that no layer needs kernels of its own.
        self._row = -(-shape.num_pages // 16) * 16
        table = torch.zeros(shape.num_layers, self._row, dtype=torch.int64)
        keys = torch.arange(shape.num_layers * shape.num_pages)
        table[:, : shape.num_pages] = self.home(keys).view(shape.num_layers, -1)
        self._table = table.to(streams.device)
        self.origin = torch.tensor([self._origin], device=streams.device)

    @property
    def table(self) -> torch.Tensor:
        """int64 [L, at least P] on the device."""
        return self._table

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Places of a layer's pages on the device."""
        return self._table[layer]

    def home(self, keys: torch.Tensor) -> torch.Tensor:
        """Places on the host."""
        return self._origin + keys * self.record

    def move(self, keys: torch.Tensor, frames: torch.Tensor | None) -> None:
        """What the current stream is told from now on finds the pages in these frames, or on the
        host; int64 [n] each on the CPU."""
        if len(keys):
            places = self.home(keys) if frames is None else frames * self.frame
            keys = keys // self._shape.num_pages * self._row + keys % self._shape.num_pages
            keys, places = self._streams.upload(torch.stack([keys, places]))
            self._table.view(-1).scatter_(0, keys, places)

    def copy(self, keys: torch.Tensor, frames: torch.Tensor) -> None:
        """Copy records from the host to frames on the current stream; int64 [n > 0] each on the
        CPU. The table does not change."""
        there, to = self._streams.upload(torch.stack([keys, frames]))
        n, sizes = len(keys), {"FRAME": self.frame, "RECORD": self.record}
        with torch.cuda.device_of(self._arena):
            if self.int8:
                heads, size, dim = self._shape.page_shape
                whole = power_of_two(dim)
                part = max(1, min(size, COPY_BLOCK // whole))
                turns = n * heads * (size // part)
                self._module.bring_int8[(min(COPY_PROGRAMS, turns),)](
                    self._arena, self.codes, self.origin, there, to, n,
                    HKV=heads, D=dim, DT=whole, PAGE=size, PART=part, INT8=self.int8, **sizes,
                )  # fmt: skip
            else:
                chunks = -(-self.frame * PLACE_UNIT // COPY_BLOCK)
                self._module.bring[(min(COPY_PROGRAMS, n * chunks),)](
                    self._arena, self.origin, there, to, n,
                    CHUNKS=chunks, BLOCK=COPY_BLOCK, **sizes,
                )  # fmt: skip

    def check(self, frame_of: torch.Tensor, but: torch.Tensor) -> list[str]:
        """Whether the table is that of ``frame_of`` int32 [L, P], but for the pages ``but`` bool
        [L, P]; waits for the device."""
        frames = frame_of.flatten().long()
        want = torch.where(frames >= 0, frames * self.frame, self.home(torch.arange(len(frames))))
        have = self._table[:, : self._shape.num_pages].cpu().flatten()
        have = torch.where(but.flatten(), want, have)
        return [] if torch.equal(have, want) else ["places are not those of the tables"]
