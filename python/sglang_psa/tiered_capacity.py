"""How many tokens SGLang may count on when K and V live on two tiers: as many as the host holds.

SGLang sizes its pool by the memory that is free. Here the bytes are given: those of the host tier
are the capacity, ``--max-total-tokens`` may lower it. On CPUs ``--mem-fraction-static`` says
nothing about either tier; on a GPU all that the tiers keep there has to fit into what SGLang would
have given its own pool, and is refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_psa.config import ConfigError
from sgl_psa.memory.sizes import PADDING_PAGES, PoolSizes
from sglang_psa import compat
from sglang_psa.hooks import Hook, Kind
from sglang_psa.pool_hooks import summary_bytes
from sglang_psa.server_args import psa_config, uses_psa
from sglang_psa.tiered_sizes import tier_sizes

#: What the tier keeps on the device of a page in one layer: its place, its fill and its last step.
_PAGE_TABLE_BYTES = 8 + 4 + 4
#: What it keeps of a token under an int8 host: its row in a write. And of a frame: whether it is
#: one set aside that no page has.
_TOKEN_BYTES, _SPARE_BYTES = 4, 8


def profile(original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any) -> int:
    """The bytes of the host tier; free memory of a CPU does not matter.

    Raises:
        ConfigError: a GPU has no room for the device tier, and what is kept there beside it.
    """
    if not _tiered(configurator):
        return original(configurator, *args, **kwargs)
    if configurator.device != "cpu":
        _check_device(configurator, original(configurator, *args, **kwargs))
    return psa_config(configurator.server_args).host_pool_bytes


def limit(original: Callable[..., int], configurator: Any, token_capacity: int) -> int:
    """The tokens that the host tier holds, or ``--max-total-tokens`` if fewer."""
    if not _tiered(configurator):
        return original(configurator, token_capacity)
    return original(configurator, _sizes(configurator).tokens)


def device_bytes(configurator: Any) -> dict[str, int]:
    """What a server with tiers keeps on its device: ``frames``; ``summaries`` of every page of the
    host tier; ``tables`` of where pages are; ``prefix``, K and V of one layer of the longest
    request, through which prefill reads (:class:`sglang_psa.prefill.Prefill`)."""
    args, model, sizes = configurator.server_args, configurator.model_config, _sizes(configurator)
    tokens = min(sizes.tokens, args.max_total_tokens or sizes.tokens)
    pages = sizes.num_layers * (-(-tokens // sizes.page_size) + PADDING_PAGES)
    heads = model.get_num_kv_heads(compat.get_parallel().attn_tp_size)
    per_page = summary_bytes(psa_config(args), sizes.page_size, heads, model.head_dim)
    longest = min(tokens, model.context_len)
    frames, tables = min(sizes.num_frames, pages), pages * _PAGE_TABLE_BYTES
    if sizes.record_bytes < sizes.frame_bytes:
        tables += pages // sizes.num_layers * sizes.page_size * _TOKEN_BYTES
        tables += frames * _SPARE_BYTES
    return {
        "frames": frames * sizes.frame_bytes,
        "summaries": int(pages * per_page),
        "tables": tables,
        "prefix": longest * sizes.frame_bytes // sizes.page_size,
    }


def _check_device(configurator: Any, free: int) -> None:
    parts = device_bytes(configurator)
    needed = sum(parts.values())
    if needed > free:
        config = psa_config(configurator.server_args)
        said = ", ".join(f"{count} {name}" for name, count in parts.items())
        raise ConfigError(
            f"device_pool_bytes={config.device_pool_bytes}: the device tier and what goes with it "
            f"take {needed} bytes ({said}), and the GPU has {free} left for KV: set "
            f"device_pool_bytes to {max(config.device_pool_bytes - needed + free, 0)} or less, "
            "host_pool_bytes (summaries) or the context length (prefix) lower, or "
            "--mem-fraction-static higher"
        )


def _sizes(configurator: Any) -> PoolSizes:
    return tier_sizes(
        psa_config(configurator.server_args),
        configurator.model_config,
        page_size=configurator.server_args.page_size,
        tp_size=compat.get_parallel().attn_tp_size,
        num_layers=configurator.layer_info.num_effective_layers,
        dtype=configurator.kv_cache_dtype,
    )


def _tiered(configurator: Any) -> bool:
    args = configurator.server_args
    return uses_psa(args) and psa_config(args).tiered


HOOKS = (
    Hook("bytes of the host tier", compat.PROFILE_AVAILABLE_BYTES, profile, Kind.AROUND),
    Hook("tokens of the host tier", compat.APPLY_TOKEN_CONSTRAINTS, limit, Kind.AROUND),
)
