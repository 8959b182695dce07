"""From bytes to frames and pages, or a refusal that says how many bytes it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sgl_psa_kernels.page_tier import TierShape

from sgl_psa.config import ConfigError, HostDtypeName, PSAConfig

#: The first page takes what padding rows write; no request has it.
PADDING_PAGES = 1


class PoolSizes(NamedTuple):
    """What the two tiers hold, of one tensor-parallel rank.

    Attributes:
        num_layers: of the model.
        num_frames: pages of one layer that the device tier has room for.
        num_pages: logical pages, of all layers, that the host tier has room for; the padding page
            included.
        page_size: tokens of a page.
        frame_bytes: K and V of a page in one layer, on the device tier.
        record_bytes: the same on the host tier.
    """

    num_layers: int
    num_frames: int
    num_pages: int
    page_size: int
    frame_bytes: int
    record_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens that requests have room for."""
        return (self.num_pages - PADDING_PAGES) * self.page_size

    @property
    def device_bytes(self) -> int:
        """Of all frames."""
        return self.num_frames * self.frame_bytes

    @property
    def host_bytes(self) -> int:
        """Of all pages in all layers."""
        return self.num_pages * self.num_layers * self.record_bytes


def tier_shape(
    host_dtype: HostDtypeName,
    *,
    num_layers: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> TierShape:
    """Shape of two tiers with one page and one frame.

    Args:
        host_dtype: as in ``PSAConfig``.
        num_kv_heads: of this tensor-parallel rank.
    """
    host = torch.int8 if host_dtype == "int8" else None
    return TierShape(num_layers, 1, 1, page_size, num_kv_heads, head_dim, dtype, host)


def pool_sizes(config: PSAConfig, shape: TierShape) -> PoolSizes:
    """Sizes of the tiers that ``config`` asks for; neither is larger than its bytes.

    The device tier has no more frames than there are pages to fill them. The bytes are those of K
    and V: what is kept of every page to score it comes on top, on the device tier.

    Args:
        shape: from :func:`tier_shape`.

    Raises:
        ConfigError: a tier cannot hold the least that one request needs, or an int8 host less than
            the device tier; names the setting and the bytes.
    """
    num_layers, frame_bytes = shape.num_layers, shape.frame_bytes
    minimum_frames, record_bytes = shape.minimum_frames, num_layers * shape.record_bytes
    # A request holds its forced pages, which may all differ, and the group that is ranked first.
    pages = PADDING_PAGES + config.sink_pages + config.recent_pages + config.group_pages
    if config.host_pool_bytes < pages * record_bytes:
        raise ConfigError(
            f"host_pool_bytes={config.host_pool_bytes}: one request needs {pages} pages of "
            f"{record_bytes} bytes ({num_layers} layers); set host_pool_bytes to "
            f"{pages * record_bytes} or more"
        )
    if config.device_pool_bytes < minimum_frames * frame_bytes:
        raise ConfigError(
            f"device_pool_bytes={config.device_pool_bytes}: a decode step needs {minimum_frames} "
            f"frames of {frame_bytes} bytes; set device_pool_bytes to "
            f"{minimum_frames * frame_bytes} or more"
        )
    num_pages = config.host_pool_bytes // record_bytes
    num_frames = config.device_pool_bytes // frame_bytes
    if shape.int8_host and num_frames > num_layers * (num_pages + 1):
        least = -(-num_frames // num_layers) * record_bytes
        raise ConfigError(
            f"host_pool_bytes={config.host_pool_bytes}: the host tier holds every page, those of "
            f"the device pool ({num_frames}) too; set host_pool_bytes to {least} or more"
        )
    return PoolSizes(
        num_layers,
        min(num_frames, num_layers * num_pages),
        num_pages,
        shape.page_size,
        frame_bytes,
        shape.record_bytes,
    )
