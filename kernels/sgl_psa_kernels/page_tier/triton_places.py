"""Where records of pages lie, as kernels see it: one table over frames and host."""

from __future__ import annotations

from types import ModuleType

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.page_tier.host_store import HostStore
from sgl_psa_kernels.page_tier.shape import TierShape
from sgl_psa_kernels.page_tier.triton_streams import Inline, Streams
from sgl_psa_kernels.triton_support import PLACE_UNIT

#: Programs of a copy: enough bytes under way for the link, few multiprocessors.
COPY_PROGRAMS = 64
#: Elements that a program copies at a time.
COPY_BLOCK = 2048


class Places:
    """The table, and copies of records from the host to frames. Pages are named by key,
    layer * P + page; a place counts units of ``PLACE_UNIT`` elements from the first frame.

    Attributes:
        record: units of a record; frame f lies at f * record.
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
        self.record = shape.record_bytes // unit
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
            places = self.home(keys) if frames is None else frames * self.record
            keys = keys // self._shape.num_pages * self._row + keys % self._shape.num_pages
            keys, places = self._streams.upload(torch.stack([keys, places]))
            self._table.view(-1).scatter_(0, keys, places)

    def copy(self, keys: torch.Tensor, frames: torch.Tensor) -> None:
        """Copy records from the host to frames on the current stream; int64 [n > 0] each on the
        CPU. The table does not change."""
        there, to = self._streams.upload(torch.stack([keys, frames]))
        chunks = -(-self.record * PLACE_UNIT // COPY_BLOCK)
        with torch.cuda.device_of(self._arena):
            self._module.bring[(min(COPY_PROGRAMS, len(keys) * chunks),)](
                self._arena, self.origin, there, to, len(keys),
                RECORD=self.record, CHUNKS=chunks, BLOCK=COPY_BLOCK,
            )  # fmt: skip

    def check(self, frame_of: torch.Tensor) -> list[str]:
        """Whether the table is that of ``frame_of`` int32 [L, P]; waits for the device."""
        frames = frame_of.flatten().long()
        want = torch.where(frames >= 0, frames * self.record, self.home(torch.arange(len(frames))))
        have = self._table[:, : self._shape.num_pages].cpu().flatten()
        return [] if torch.equal(have, want) else ["places are not those of the tables"]
