"""Sizes of the two tiers of K and V in a server, and their check at start-up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sgl_psa.config import PSAConfig
    from sgl_psa.memory.sizes import PoolSizes


def tier_sizes(
    config: PSAConfig,
    model: Any,
    *,
    page_size: int,
    tp_size: int,
    num_layers: int,
    dtype: torch.dtype,
    max_requests: int | None = None,
) -> PoolSizes:
    """What the tiers of one rank hold.

    Args:
        model: SGLang's ``ModelConfig``.
        tp_size: ranks that share the model's KV heads.
        max_requests: most requests that run at once, if that is known.

    Raises:
        ConfigError: a tier cannot hold the least that one request, the placement or so many
            requests need.
    """
    from sgl_psa.memory import open_pages
    from sgl_psa.memory.placements import PLACEMENTS
    from sgl_psa.memory.sizes import pool_sizes, tier_shape

    shape = tier_shape(
        config.host_dtype,
        num_layers=num_layers,
        page_size=page_size,
        num_kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=model.head_dim,
        dtype=dtype,
    )
    found = pool_sizes(config, shape)
    shape = shape._replace(num_pages=found.num_pages, num_frames=found.num_frames)
    PLACEMENTS[config.placement](shape)
    if max_requests is not None:
        open_pages.check(config, shape, max_requests)
    return found


def check_tiers(config: PSAConfig, server_args: Any, model: Any) -> None:
    """Refuse tiers at start-up, before the model is loaded.

    Raises:
        ConfigError: a tier is too small for one request, for the placement or for the requests
            that run at once (checked again when the scheduler starts, which may choose how many),
            the machine's memory or the disk is too small for them, or the folder of the host tier
            cannot be written to.
    """
    if not config.tiered:
        return
    import psutil

    from sgl_psa.config import ConfigError
    from sgl_psa.memory.host_file import HostFile

    found = tier_sizes(
        config,
        model,
        page_size=server_args.page_size,
        tp_size=server_args.tp_size,
        num_layers=model.num_hidden_layers,
        dtype=model.dtype,
        max_requests=server_args.max_running_requests,
    )
    ranks = server_args.tp_size * server_args.dp_size
    memory, on_gpu = psutil.virtual_memory(), server_args.device == "cuda"
    taken = 0 if config.host_path else found.host_bytes
    # Pinned memory is taken at once, other memory as it fills; frames on a GPU are checked when it
    # is known what the model leaves there (tiered_capacity.py).
    there = memory.available if on_gpu else memory.total
    taken += 0 if on_gpu else found.device_bytes
    if ranks * taken > there:
        pools = f"host_pool_bytes={config.host_pool_bytes}"
        if not on_gpu:
            pools = f"device_pool_bytes={config.device_pool_bytes} and {pools}"
        raise ConfigError(
            f"{pools} of {ranks} ranks take {ranks * taken} bytes of memory, the machine has "
            f"{there}{' free' if on_gpu else ''}; set {'it' if on_gpu else 'them'} lower"
            + ("" if config.host_path or on_gpu else ", or set host_path to a folder on a disk")
        )
    if config.host_path:
        HostFile(config.host_path, 1).close()
        disk = os.statvfs(config.host_path)
        if disk.f_bavail * disk.f_frsize < ranks * found.host_bytes:
            raise ConfigError(
                f"host_path={config.host_path!r} has {disk.f_bavail * disk.f_frsize} bytes free, "
                f"host_pool_bytes of {ranks} ranks take {ranks * found.host_bytes}: set "
                "host_pool_bytes lower, or name another folder"
            )
