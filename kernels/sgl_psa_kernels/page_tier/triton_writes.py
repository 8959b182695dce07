"""Writes of many tokens, which go to the host while the caller's stream computes the next layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sgl_psa_kernels.page_tier.triton_streams import Event, Inline, Streams

#: Writes of at least so many tokens go beside: chunks of a prompt. What a decode step writes is
#: read at once.
BESIDE_TOKENS = 256


class Writes:
    """Writes that may still be under way, at most one a layer that the caller has to wait for: the
    side stream runs them in order.

    A write looks up where its pages lie when it runs. So tables of places must not change, and
    nothing of the layer be read or written, before :meth:`settle`.
    """

    def __init__(self, streams: Streams | Inline) -> None:
        self._streams = streams
        self._under_way: dict[int, Event] = {}

    def begin(self, layer: int, work: Callable[[], None], *rows: torch.Tensor) -> None:
        """Do ``work``, a write of ``rows`` to a layer, beside the current stream if they are many;
        that of the layer before has been settled."""
        if len(rows[0]) < BESIDE_TOKENS:
            work()
        else:
            self._under_way[layer] = self._streams.aside(work, *rows)

    def settle(self, layer: int | None = None) -> None:
        """What the current stream is told from now on comes after the writes of a layer, or of
        all."""
        layers = list(self._under_way) if layer is None else [layer]
        for each in layers:
            event = self._under_way.pop(each, None)
            if event is not None:
                self._streams.wait(event)
