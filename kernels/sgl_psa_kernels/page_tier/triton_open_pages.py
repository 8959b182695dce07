"""Pages that are not full under an int8 host, of a tier in Triton: frames set aside for them."""

from __future__ import annotations

import torch

from sgl_psa_kernels.page_tier import codec
from sgl_psa_kernels.page_tier.shape import TierShape
from sgl_psa_kernels.page_tier.tier import OP
from sgl_psa_kernels.page_tier.triton_frames import FrameBook
from sgl_psa_kernels.page_tier.triton_places import Places
from sgl_psa_kernels.page_tier.triton_state import DeviceState
from sgl_psa_kernels.page_tier.triton_streams import Inline, Streams
from sgl_psa_kernels.triton_support import kernels, power_of_two

#: Rows of a program that looks for pages; elements that a program encodes at a time.
ROWS = 128
TILE = 4096


class OpenPages:
    """Which frame an open page has, the device decides: a write's slots are there. A page takes a
    frame from those set aside when it is begun, and gives it back when it is full or released.

    Attributes:
        count: frames set aside.
    """

    def __init__(
        self,
        shape: TierShape,
        book: FrameBook,
        places: Places,
        state: DeviceState,
        streams: Streams | Inline,
        arena: torch.Tensor,
    ) -> None:
        self._shape, self._book, self._places = shape, book, places
        self._state, self._streams = state, streams
        self._arena = arena
        device = streams.device
        self._spare = torch.zeros(1 + shape.num_frames, dtype=torch.int64, device=device)
        slots = shape.num_pages * shape.page_size
        self._row_of = torch.zeros(slots, dtype=torch.int32, device=device)
        self.count = 0

    def set_aside(self, count: int) -> None:
        """Have ``count`` frames for open pages, but no fewer than those have now; waits for the
        device.

        Raises:
            RuntimeError: so many frames are not free.
        """
        spare = self._unused()
        if count > self.count:
            spare += self._book.set_aside(count - self.count)
        else:
            fewer = min(self.count - count, len(spare))
            self._book.take_back(spare[:fewer])
            spare = spare[fewer:]
            count = self.count - fewer
        self.count = count
        self._spare[: 1 + len(spare)] = torch.tensor([len(spare), *spare])

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """See :meth:`PageTier.write`."""
        n, places, shape = len(slots), self._places, self._shape
        heads, size, dim = shape.page_shape
        place = places[layer]
        module = kernels(OP, "page_tier.triton_open_kernels", slots, k, v, place)
        low, high = codec.EXPONENTS[shape.dtype]
        whole = power_of_two(dim)
        blocks = (-(-n // ROWS),)
        with torch.cuda.device_of(k):
            module.index[blocks](slots, self._row_of, n, BLOCK=ROWS)
            module.claim[blocks](
                slots, self._row_of, place, self._spare, n, places.end,
                PAGE=size, FRAME=places.frame, BLOCK=ROWS,
            )  # fmt: skip
            module.store[(n,)](
                k, v, slots, self._row_of, self._arena, places.codes, place, places.origin,
                self._state.pages[0], self._state.numbers, self._spare,
                layer, shape.num_pages, n, places.end, *k.stride()[:2], *v.stride()[:2],
                HKV=heads, HT=power_of_two(heads), D=dim, DT=whole, PAGE=size,
                FRAME=places.frame, RECORD=places.record, BYTES=places.int8,
                DIMS=min(whole, TILE // size), TOKENS=min(size, TILE // whole),
                LOW=low, HIGH=high,
            )  # fmt: skip

    def release(self, pages: torch.Tensor) -> None:
        """Pages int64 [n > 0] on the device hold nothing; the table still has their places."""
        n, places, layers = len(pages), self._places, self._shape.num_layers
        module = kernels(OP, "page_tier.triton_open_kernels", pages)
        with torch.cuda.device_of(pages):
            module.give_back[(-(-n * layers // ROWS),)](
                pages, places.table, self._state.pages[0], self._spare, n, layers,
                self._shape.num_pages, places.table.shape[1], places.end,
                PAGE=self._shape.page_size, FRAME=places.frame, BLOCK=ROWS,
            )  # fmt: skip

    def check(self, filled: torch.Tensor) -> list[str]:
        """Whether every open page has a frame of its own among those set aside. ``filled`` int32
        [L, P]; waits for the device."""
        table = self._places.table[:, : self._shape.num_pages].cpu()
        frames = table[self.open(filled)] // self._places.frame
        have = sorted(frames.tolist() + self._unused())
        same = have == self._book.aside().tolist()
        return [] if same else ["frames set aside are not those of open pages and spare ones"]

    def open(self, filled: torch.Tensor) -> torch.Tensor:
        """bool [L, P]."""
        return (filled > 0) & (filled < self._shape.page_size)

    def _unused(self) -> list[int]:
        count, *frames = self._spare.tolist()
        return frames[:count]
