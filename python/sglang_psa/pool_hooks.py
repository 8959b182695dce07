"""Where SGLang builds, sizes and empties its KV pool, and where models write around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sgl_psa.config import PSAConfig
from sgl_psa.scorers import CacheShape
from sgl_psa.summaries import make_summaries
from sglang_psa import compat
from sglang_psa.hooks import Hook, Kind
from sglang_psa.server_args import psa_config, uses_psa

#: Pages of the small states that are measured; a multiple of any grouping of pages.
_SAMPLE_PAGES = 256


def build_kv_pool(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    """``PSAKVPool``, or its form on two tiers, for a server that decodes with psa; SGLang's choice
    otherwise.

    The builder used is SGLang's general one for MHA pools, on CPU as on CUDA: the one for
    out-of-tree platforms would drop arguments.
    """
    if not uses_psa(configurator.server_args):
        return original(configurator, **kwargs)
    from functools import partial

    config = psa_config(configurator.server_args)
    pool: type
    if config.tiered:
        from sglang_psa.tiered_pool import PSATieredKVPool as pool
    else:
        from sglang_psa.kv_pool import PSAKVPool as pool
    return configurator._build_mha_kv_pool(
        max_total_num_tokens=kwargs["sizes"].max_total_num_tokens,
        mha_pool_class=partial(pool, psa_config=config),
    )


def add_summary_bytes(cell: int, sizer: Any, configurator: Any, num_layers: int) -> int | None:
    """Charge the summaries to the memory budget: bytes a token over all layers."""
    if not uses_psa(configurator.server_args):
        return None
    model = configurator.model_config
    heads = model.get_num_kv_heads(compat.get_parallel().attn_tp_size)
    page_size = configurator.server_args.page_size
    per_page = summary_bytes(psa_config(configurator.server_args), page_size, heads, model.head_dim)
    return cell + math.ceil(per_page * num_layers / page_size)


def summary_bytes(config: PSAConfig, page_size: int, num_kv_heads: int, head_dim: int) -> float:
    """Bytes of the summaries' state by which one more page of one layer makes it larger.

    Measured on two small states, so that any setting is charged for what it allocates.
    """

    def size(num_pages: int) -> int:
        shape = CacheShape(1, num_pages, page_size, num_kv_heads, head_dim, torch.device("cpu"))
        return make_summaries(config, shape, "reference").size_bytes()

    return (size(2 * _SAMPLE_PAGES) - size(_SAMPLE_PAGES)) / _SAMPLE_PAGES


def no_fused_store(enabled: bool, *args: Any, **kwargs: Any) -> bool | None:
    """Keep models from storing K inside their rotary kernel, past the pool's summaries."""
    return False if enabled and _is_psa(compat.get_token_to_kv_pool()) else None


def release_pages(result: Any, allocator: Any, *page_ids: Any) -> None:
    """Forget the summaries of pages that return to the free list."""
    if _is_psa(allocator._kvcache):
        for pages in page_ids:
            allocator._kvcache.forget_pages(pages)


def clear_pages(result: Any, allocator: Any) -> None:
    """Forget every summary when the whole cache is flushed."""
    if _is_psa(allocator._kvcache):
        allocator._kvcache.forget_all()


def _is_psa(pool: Any) -> bool:
    return hasattr(pool, "forget_pages")


HOOKS = (
    Hook("KV pool", compat.BUILD_KV_POOL, build_kv_pool, Kind.AROUND),
    Hook("KV memory budget", compat.COMPUTE_CELL_SIZE, add_summary_bytes, Kind.AFTER),
    Hook("no fused KV store", compat.ENABLE_FUSED_KV_STORE, no_fused_store, Kind.AFTER),
    Hook("page release", compat.RELEASE_PAGES, release_pages, Kind.AFTER),
    Hook("cache flush", compat.CLEAR_PAGES, clear_pages, Kind.AFTER),
)
