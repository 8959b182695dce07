"""KV pages of all layers in a few frames, the rest on the host.

Frames are shared by layers and requests: a frame is room for one page of one layer, keys and values
heads-first. Decode attends pages in the order of its rule, never in that of arrival, and loads what
it lacks; so its output is that of a pool in which all pages lie in memory. ``reference.py`` is the
specification: plain torch, no thread.

Sources of the idea: selected pages from a second tier (InfiniGen, ArkVale), frames to the layers
that need them, loading of the next group while one is attended.
"""

from collections.abc import Callable

from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.page_tier.cpu import NativeTier
from sgl_psa_kernels.page_tier.host_store import HostStore, HostStoreError
from sgl_psa_kernels.page_tier.reference import ReferenceTier
from sgl_psa_kernels.page_tier.shape import TierCounters, TierShape, TierTables
from sgl_psa_kernels.page_tier.tier import PageTier

_IMPLEMENTATIONS: dict[str, Callable[[TierShape, HostStore, bool], PageTier]] = {
    "reference": ReferenceTier,
    "cpu": NativeTier,
}


def make_tier(
    shape: TierShape, host: HostStore, *, backend: str, pipeline: bool = True
) -> PageTier:
    """An empty tier.

    Args:
        shape: sizes.
        host: at least ``shape.host_bytes`` bytes, of this tier alone.
        backend: "reference" or "cpu" (C++).
        pipeline: load the group of pages that is next in order while one is attended; otherwise
            pages are loaded when they are needed. The reference loads nothing ahead.

    Raises:
        ValueError: unknown backend, a bad shape, fewer frames than ``shape.minimum_frames``, a host
            store that is too small.
        RuntimeError: backend "cpu" without a usable native library.
    """
    return choose(backend, _IMPLEMENTATIONS, "page_tier")(shape, host, pipeline)


__all__ = [
    "HostStore",
    "HostStoreError",
    "PageTier",
    "TierCounters",
    "TierShape",
    "TierTables",
    "make_tier",
]
