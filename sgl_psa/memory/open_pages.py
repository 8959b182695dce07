"""Pages that requests are writing: under an int8 host they keep their frames until full."""

from __future__ import annotations

from sgl_psa_kernels.page_tier import PageTier, TierShape

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.memory.placements import PLACEMENTS
from sgl_psa.memory.sizes import PADDING_PAGES


def check(config: PSAConfig, shape: TierShape, max_requests: int) -> None:
    """Refuse a device tier that open pages may fill up.

    Each request that runs writes to one page, and padding to one more.

    Args:
        shape: of the tier.
        max_requests: most requests that run at once.

    Raises:
        ConfigError: naming what to change.
    """
    if not shape.int8_host:
        return
    quota = PLACEMENTS[config.placement](shape).quota
    layers, least = shape.num_layers, shape.minimum_frames
    open_pages = most(shape, max_requests)
    fits = min((shape.num_frames - least) // layers, quota - least)
    if open_pages <= fits:
        return
    frames = layers * open_pages + least
    if quota < shape.num_frames:
        frames = layers * (open_pages + least)
    fewer = fits - PADDING_PAGES
    lower = f", --max-running-requests to {fewer} or less" if fewer >= 1 else ""
    raise ConfigError(
        f"device_pool_bytes={config.device_pool_bytes}: under host_dtype='int8' a page stays on "
        f"the device tier until it is full; {max_requests} requests that run at once take "
        f"{frames} of its frames, which has {shape.num_frames}; set device_pool_bytes to "
        f"{frames * shape.frame_bytes} or more{lower}, or host_dtype to auto"
    )


def most(shape: TierShape, max_requests: int) -> int:
    """Pages of a layer that are not full at a time, at most."""
    return min(max_requests + PADDING_PAGES, shape.num_pages)


def reserve(config: PSAConfig, tier: PageTier, max_requests: int) -> int:
    """:func:`check`, and tell the tier, before requests run.

    Returns:
        The frames that it set aside for such pages.

    Raises:
        ConfigError: naming what to change.
    """
    check(config, tier.shape, max_requests)
    if tier.shape.int8_host:
        tier.set_open_pages(most(tier.shape, max_requests))
    return tier.set_aside
