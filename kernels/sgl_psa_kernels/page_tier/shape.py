"""Sizes, tables and counters of a page tier."""

import math
from typing import NamedTuple

import torch

#: Tokens that attention takes together; see ``_native/src/attend.h``.
BLOCK_TOKENS = 64

#: Owner of frames that are set aside for pages that are not full (int8 host, "triton").
ASIDE = -2


class TierShape(NamedTuple):
    """What a tier holds.

    Attributes:
        num_layers: layers that share the frames.
        num_pages: logical pages, those of padding included; every layer has each of them.
        num_frames: frames on the device tier, each room for one page of one layer.
        page_size: tokens per page, a power of two.
        num_kv_heads, head_dim, dtype: of keys and values.
        host_dtype: of the elements on the host: ``dtype`` (None: that too), or int8 with shared
            exponents, see ``codec.py``. Under int8 a page is rounded when it is full, in its frame
            too, and stays in a frame until then.
    """

    num_layers: int
    num_pages: int
    num_frames: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    host_dtype: torch.dtype | None = None

    @property
    def int8_host(self) -> bool:
        """Whether the host has pages in int8."""
        return self.host_dtype == torch.int8

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """[Hkv, page_size, D] of the keys, or the values, of one page."""
        return (self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one page of one layer, keys and values, in a frame."""
        return 2 * math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of one page of one layer, keys and values, on the host."""
        if not self.int8_host:
            return self.frame_bytes
        exponents = self.num_kv_heads * (self.head_dim + self.page_size)
        return -(-(2 * math.prod(self.page_shape) + exponents) // 64) * 64

    @property
    def host_bytes(self) -> int:
        """Bytes of the host store: a record for every page of every layer."""
        return self.num_layers * self.num_pages * self.record_bytes

    @property
    def block_pages(self) -> int:
        """Pages that attention takes together."""
        return max(1, BLOCK_TOKENS // self.page_size)

    @property
    def minimum_frames(self) -> int:
        """Frames without which attention cannot go on: two blocks of pages."""
        return 2 * self.block_pages


class TierTables(NamedTuple):
    """State of the tier as CPU tensors: L layers, P logical pages, F frames.

    Policies may read them between two calls of the tier, and may lower ``uses``; nothing else is
    theirs to change. With loads or saves under way ``busy`` and ``saved`` change at any time.

    Attributes:
        frame_of: int32 [L, P], frame of a page, -1: none.
        owner: int64 [F], layer * P + page, -1: free, ``ASIDE``: for pages that are not full, whose
            frames the tables do not name then.
        saved: int32 [L, P], tokens that the host has, 0..page_size.
        filled: int32 [L, P], tokens written at all, 0..page_size.
        stamp: int32 [L, P], step in which a decode last attended the page, 0: never.
        uses: int32 [F], (row, KV head) pairs and steps that attended the page since it came.
        came: int64 [F], running number of the page's coming; larger is later.
        busy: uint8 [F], 1: being loaded or saved, attended, or not yet saved whole. Not to be
            named as a victim.
    """

    frame_of: torch.Tensor
    owner: torch.Tensor
    saved: torch.Tensor
    filled: torch.Tensor
    stamp: torch.Tensor
    uses: torch.Tensor
    came: torch.Tensor
    busy: torch.Tensor

    @classmethod
    def empty(cls, shape: TierShape) -> "TierTables":
        """Tables of a tier that holds nothing."""
        pages, frames = (shape.num_layers, shape.num_pages), shape.num_frames
        return cls(
            frame_of=torch.full(pages, -1, dtype=torch.int32),
            owner=torch.full((frames,), -1, dtype=torch.int64),
            saved=torch.zeros(pages, dtype=torch.int32),
            filled=torch.zeros(pages, dtype=torch.int32),
            stamp=torch.zeros(pages, dtype=torch.int32),
            uses=torch.zeros(frames, dtype=torch.int32),
            came=torch.zeros(frames, dtype=torch.int64),
            busy=torch.zeros(frames, dtype=torch.uint8),
        )

    def check(self, page_size: int) -> list[str]:
        """What contradicts itself; an empty list if nothing does. For a tier that is idle."""
        problems = []
        pages = self.frame_of.shape[1]
        layer, page = torch.nonzero(self.frame_of >= 0, as_tuple=True)
        frame = self.frame_of[layer, page].long()
        used = torch.nonzero(self.owner >= 0).flatten()
        if not torch.equal(self.owner[frame], layer * pages + page):
            problems.append("frame_of names frames whose owner is another page")
        if not torch.equal(self.frame_of.flatten()[self.owner[used]].long(), used):
            problems.append("owner names pages that have another frame")
        if bool(((self.saved < 0) | (self.saved > self.filled)).any()):
            problems.append("saved is not within 0..filled")
        if bool(((self.filled < 0) | (self.filled > page_size)).any()):
            problems.append("filled is not within 0..page_size")
        if bool(((self.frame_of < 0) & (self.saved < self.filled)).any()):
            problems.append("tokens of pages without frame are not on the host")
        if bool(((self.frame_of >= 0) & (self.filled == 0)).any()):
            problems.append("frames hold pages without tokens")
        if bool(((self.saved < self.filled) & (self.filled == page_size)).any()):
            problems.append("full pages are not on the host")
        dirty = torch.zeros_like(self.busy)
        dirty[used] = (self.saved < self.filled).flatten()[self.owner[used]].to(torch.uint8)
        if not torch.equal(self.busy, dirty):
            problems.append("busy is not what is left to save")
        return problems


class TierCounters(NamedTuple):
    """Running totals of a tier since it was made; ``clear`` keeps them.

    Attributes:
        hits: pages attended by (row, KV head) pairs, without the ``loads`` that they waited for;
            hits / (hits + attended loads) is the hit rate.
        loads: pages brought from the host to a frame.
        bytes_loaded, bytes_saved: between frames and host, both ways, as the host has them.
        bytes_in_vain: loaded to a frame that was given up before any head attended it.
        stall_ns: core nanoseconds of decode without anything to do but to wait for loads.
        evictions: frames taken from a page.
        recycled: evictions of frames that the victims' order did not name.
        bytes_read_through: attended on the host where they lie, by (row, KV head) pairs; of
            "triton" alone, whose ``loads`` nothing waits for: its hit rate is hits / (hits +
            bytes_read_through / bytes of a page of one head).
    """

    hits: int
    loads: int
    bytes_loaded: int
    bytes_saved: int
    bytes_in_vain: int
    stall_ns: int
    evictions: int
    recycled: int
    bytes_read_through: int = 0
