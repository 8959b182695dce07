"""How many tokens SGLang may count on when K and V live on two tiers: as many as the host holds.

SGLang sizes its pool by the memory that is free. Here the bytes are given: those of the host tier
are the capacity, ``--max-total-tokens`` may lower it, and ``--mem-fraction-static`` says nothing
about either tier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_psa import compat
from sglang_psa.hooks import Hook, Kind
from sglang_psa.server_args import psa_config, uses_psa
from sglang_psa.tiered_sizes import tier_sizes


def profile(original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any) -> int:
    """The bytes of the host tier; free memory does not matter."""
    if not _tiered(configurator):
        return original(configurator, *args, **kwargs)
    return psa_config(configurator.server_args).host_pool_bytes


def limit(original: Callable[..., int], configurator: Any, token_capacity: int) -> int:
    """The tokens that the host tier holds, or ``--max-total-tokens`` if fewer."""
    if not _tiered(configurator):
        return original(configurator, token_capacity)
    found = tier_sizes(
        psa_config(configurator.server_args),
        configurator.model_config,
        page_size=configurator.server_args.page_size,
        tp_size=compat.get_parallel().attn_tp_size,
        num_layers=configurator.layer_info.num_effective_layers,
        dtype=configurator.kv_cache_dtype,
    )
    return original(configurator, found.tokens)


def _tiered(configurator: Any) -> bool:
    args = configurator.server_args
    return uses_psa(args) and psa_config(args).tiered


HOOKS = (
    Hook("bytes of the host tier", compat.PROFILE_AVAILABLE_BYTES, profile, Kind.AROUND),
    Hook("tokens of the host tier", compat.APPLY_TOKEN_CONSTRAINTS, limit, Kind.AROUND),
)
