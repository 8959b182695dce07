"""The page tier: what both implementations share, and the checks of their arguments."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.page_tier.host_store import HostStore, lazy_bytes
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape, TierTables
from sgl_psa_kernels.progressive_decode.arguments import DecodeArguments
from sgl_psa_kernels.progressive_decode.modes import NUM_STATS

OP = "page_tier"


class PageTier(ABC):
    """Keys and values of logical pages, in frames and on the host.

    The host has every full page (it is saved when it fills), so its frame can be taken at no cost.
    A page that is not yet full lives in a frame and is saved when it fills or when its frame is
    taken. With an int8 host its frame cannot be taken, and when it fills it is rounded before
    anybody reads it; so frame and host say the same, and what is read does not depend on where a
    page has been. One thread calls; nothing here is reentrant.

    Attributes:
        shape: sizes.
        tables: where pages are; see :class:`TierTables` for when they may be read.
        host: the backing store.
        k_frames, v_frames: the frames, [F, Hkv, page_size, D].

    Every method raises RuntimeError after :meth:`close`, and :class:`HostStoreError` from the first
    failed transfer on.
    """

    def __init__(self, shape: TierShape, host: HostStore) -> None:
        _check_shape(shape, host)
        self.shape, self.host = shape, host
        self.tables = TierTables.empty(shape)
        self.k_frames, self.v_frames = self._make_frames()

    def _make_frames(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the frames, [F, Hkv, page_size, D] each."""
        size = (self.shape.num_frames, *self.shape.page_shape)
        half = self.shape.num_frames * self.shape.frame_bytes // 2
        k, v = (lazy_bytes(half).view(self.shape.dtype).view(size) for _ in range(2))
        return k, v

    @property
    def minimum_frames(self) -> int:
        """The fewest frames that a tier can work with, and the smallest quota."""
        return self.shape.minimum_frames

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens to pages of a layer.

        Every page is filled in the order of its slots; a write to its first slot starts it anew. A
        page that is not full afterwards has a frame, taken from another page if need be. A page
        that is, is saved to the host; one written whole by this call keeps a frame only if a free
        one was there: a prefill takes frames from nobody.

        Args:
            layer: 0..L-1.
            slots: int64 [N], page * page_size + offset, in token order. Slots of one page need not
                be neighbours in ``slots``.
            k, v: [N, Hkv, D] in the tier's dtype, last dimension contiguous.

        Raises:
            ValueError: bad arguments, or a slot whose page is not filled right up to it. Nothing
                was written then.
            RuntimeError: with an int8 host, all frames that the layer may take hold pages that are
                not full. What comes before the page that needs one was written.
        """
        self._layer(layer)
        shape = self.shape
        checks.check_tensor(OP, "slots", slots, torch.int64, (None,))
        want = (slots.shape[0], shape.num_kv_heads, shape.head_dim)
        for name, rows in (("k", k), ("v", v)):
            checks.check_tensor(OP, name, rows, shape.dtype, want, contiguous=False)
            checks.require(
                rows.stride(2) == 1, f"{OP}: last dimension of {name} must be contiguous"
            )
        if len(slots):
            self._write(layer, slots, k, v)

    def gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None:
        """Copy the first ``tokens`` tokens of consecutive pages, from frames or from the host.

        Takes no frame and leaves all as it is.

        Args:
            pages: int64 [n], at least as many as the tokens need.
            k_out, v_out: [tokens, Hkv, D], contiguous, in the tier's dtype.

        Raises:
            ValueError: bad arguments.
            RuntimeError: a page holds fewer tokens than are asked for.
        """
        self._layer(layer)
        shape = self.shape
        self._pages(pages)
        checks.require(
            0 <= tokens <= len(pages) * shape.page_size,
            f"{OP}: {tokens} tokens do not lie in {len(pages)} pages of {shape.page_size}",
        )
        want = (tokens, shape.num_kv_heads, shape.head_dim)
        checks.check_tensor(OP, "k_out", k_out, shape.dtype, want)
        checks.check_tensor(OP, "v_out", v_out, shape.dtype, want)
        if tokens:
            self._gather(layer, pages, tokens, k_out, v_out)

    def decode(
        self,
        layer: int,
        step: int,
        *given: Any,
        stats: torch.Tensor | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:func:`progressive_decode` over pages of a layer; what it needs is loaded.

        The result is that of the same backend of ``progressive_decode`` on the same keys and
        values, bit for bit, whatever lies in frames.

        Args:
            step: running number of the decode step, >= 1, for ``tables.stamp``.
            stats: float32 [B, Hkv, 6], contiguous; written and returned if given.
            given, named: those of ``DecodeArguments``, as in ``progressive_decode``.

        Raises:
            ValueError: as ``progressive_decode``.
            RuntimeError: a page to attend holds fewer tokens than its row has in it; with an int8
                host, pages that are not full leave fewer frames than a block of pages needs.
        """
        self._layer(layer)
        shape = self.shape
        checks.require(1 <= step < 2**31, f"{OP}: step must be 1..2^31-1, got {step}")
        arguments = DecodeArguments(*given, **named)
        arguments.check(OP, shape.dtype, shape.num_kv_heads, shape.head_dim)
        if stats is not None:
            want = (len(arguments.q), shape.num_kv_heads, NUM_STATS)
            checks.check_tensor(OP, "stats", stats, torch.float32, want)
        return self._decode(layer, step, arguments, stats)

    def release(self, pages: torch.Tensor) -> None:
        """Logical pages are free: every layer forgets them, and their frames are free.

        Args:
            pages: int64 [n]; pages that hold nothing may be among them.

        Raises:
            ValueError: a page outside of the tier.
        """
        self._pages(pages)
        if len(pages):
            self._release(pages)

    def set_victims(self, order: torch.Tensor) -> None:
        """The order in which frames may be taken, until the next call.

        A frame is passed over if it is busy, free, of another layer than a layer at its quota may
        take, or if its page was attended since ``order`` was set. When none is left, frames are
        taken in a fixed rotation (counted as ``recycled``).

        Args:
            order: int32 [Q, N], frames, padded with -1; layer l takes from row l % Q.

        Raises:
            ValueError: bad shape, or a frame outside of the tier.
        """
        checks.check_tensor(OP, "order", order, torch.int32, (None, None))
        checks.require(order.shape[0] >= 1, f"{OP}: order needs a row")
        if order.numel():
            low, high = order.aminmax()
            checks.require(
                int(low) >= -1 and int(high) < self.shape.num_frames,
                f"{OP}: order names frames outside of -1..{self.shape.num_frames - 1}",
            )
        self._set_victims(order)

    def set_quota(self, frames_per_layer: int) -> None:
        """A layer that has as many frames takes only its own from now on; num_frames: no quota.

        Raises:
            ValueError: fewer than ``minimum_frames`` or more than there are.
        """
        low, high = self.minimum_frames, self.shape.num_frames
        checks.require(
            low <= frames_per_layer <= high,
            f"{OP}: a quota must be {low}..{high} frames a layer, got {frames_per_layer}; "
            "give the device tier more bytes or choose a placement without quota",
        )
        self._set_quota(frames_per_layer)

    def set_open_pages(self, pages: int) -> None:
        """At most so many pages of each layer are not full at a time, which an int8 host's tier has
        frames for. Tiers whose writes find frames where they are need not be told; "triton" sets
        them aside. Called before pages are attended.

        Raises:
            ValueError: fewer than one page, or more than there are frames for.
            RuntimeError: pages have so many frames by now that those cannot be set aside.
        """
        self._require_open()
        checks.require(pages >= 1, f"{OP}: {pages} open pages are too few; set 1 or more")
        frames = self.shape.num_layers * pages
        if self.shape.int8_host:
            checks.require(
                frames <= self.shape.num_frames,
                f"{OP}: {pages} open pages of {self.shape.num_layers} layers need {frames} frames, "
                f"there are {self.shape.num_frames}; give the device tier more bytes",
            )
            self._set_open_pages(pages)

    @property
    def set_aside(self) -> int:
        """Frames that only pages which are not full get."""
        return 0

    @abstractmethod
    def clear(self) -> None:
        """Release all pages."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until nothing is being loaded or saved."""

    @abstractmethod
    def counters(self) -> TierCounters:
        """Running totals."""

    def misses(self, counters: TierCounters) -> int:
        """Pages attended, by (row, KV head) pairs, that had no frame."""
        return counters.loads - counters.bytes_in_vain // self.shape.record_bytes

    @abstractmethod
    def check(self) -> list[str]:
        """Every inconsistency of the state, after :meth:`drain`; an empty list if all is well."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads. The host store stays open. May be called again."""

    @abstractmethod
    def _require_open(self) -> None: ...

    @abstractmethod
    def _write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None: ...

    @abstractmethod
    def _gather(
        self, layer: int, pages: torch.Tensor, tokens: int, k_out: torch.Tensor, v_out: torch.Tensor
    ) -> None: ...

    @abstractmethod
    def _decode(
        self, layer: int, step: int, arguments: DecodeArguments, stats: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def _release(self, pages: torch.Tensor) -> None: ...

    @abstractmethod
    def _set_victims(self, order: torch.Tensor) -> None: ...

    def _set_open_pages(self, pages: int) -> None:  # noqa: B027 - most tiers set nothing aside
        pass

    @abstractmethod
    def _set_quota(self, frames_per_layer: int) -> None: ...

    def _layer(self, layer: int) -> None:
        self._require_open()
        if not 0 <= layer < self.shape.num_layers:
            raise ValueError(f"{OP}: layer {layer} is not one of {self.shape.num_layers}")

    def _pages(self, pages: torch.Tensor) -> None:
        self._require_open()
        checks.check_tensor(OP, "pages", pages, torch.int64, (None,))
        if len(pages):
            low, high = pages.aminmax()
            checks.require(
                int(low) >= 0 and int(high) < self.shape.num_pages,
                f"{OP}: pages outside of 0..{self.shape.num_pages - 1}",
            )


def no_frame(layer: int, open_pages: int) -> str:
    """The message of a call of an int8 host's tier that open pages leave no frames for."""
    return (
        f"{OP}: layer {layer} finds no frame: {open_pages} frames hold pages that are not full, "
        "which an int8 host does not take; give the device tier more frames, or write to fewer "
        "pages at a time"
    )


def _check_shape(shape: TierShape, host: HostStore) -> None:
    checks.check_page_size(OP, shape.page_size)
    checks.require(
        min(shape.num_layers, shape.num_pages, shape.num_kv_heads) >= 1,
        f"{OP}: layers, pages and KV heads must be at least 1, got {shape}",
    )
    checks.require(
        shape.head_dim > 0 and shape.head_dim % 16 == 0,
        f"{OP}: head_dim must be a multiple of 16, got {shape.head_dim}",
    )
    checks.require(
        shape.dtype in checks.KV_DTYPES,
        f"{OP}: pages must be bfloat16, float16 or float32, got {shape.dtype}",
    )
    checks.require(
        shape.host_dtype in (None, shape.dtype, torch.int8),
        f"{OP}: the host has pages in {shape.dtype} or torch.int8, not {shape.host_dtype}",
    )
    checks.require(
        shape.num_frames >= shape.minimum_frames,
        f"{OP}: {shape.num_frames} frames are too few; attention needs {shape.minimum_frames} "
        f"of {shape.frame_bytes} bytes",
    )
    checks.require(
        host.num_bytes >= shape.host_bytes,
        f"{OP}: the host store has {host.num_bytes} bytes, {shape.num_pages} pages of "
        f"{shape.num_layers} layers need {shape.host_bytes}",
    )
