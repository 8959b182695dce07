"""What ``GET /psa/stats`` tells of two tiers, and ``GET /psa/memory/check``: their integrity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: ``rid`` of a question for the internal state that asks for the integrity check too.
CHECK = "psa-memory-check"
#: Fields of the section that are the same in every rank.
_COMMON = ("placement", "pipeline", "host_kind", "host_dtype", "frame_bytes", "record_bytes")
#: Fields of which ``ranks`` tells rank by rank.
_BY_RANK = ("hits", "misses", "hit_rate", "loads", "bytes_loaded", "stall_ms", "frames_used")


def section(pool: Any, scheduler: Any, question: Any) -> dict[str, Any] | None:
    """The part of all tensor-parallel ranks together, each of which has tiers of its own for its KV
    heads; ``None`` where all pages are in memory. Every rank calls it, for the same question.

    Asked by :data:`CHECK`, it has ``idle`` and, if so, ``problems``.
    """
    if pool.tier is None:
        return None
    own = _of_rank(pool, scheduler, question)
    if scheduler.ps.tp_size == 1:
        return own
    parts: list[dict[str, Any] | None] = [None] * scheduler.ps.tp_size
    torch.distributed.all_gather_object(parts, own, group=scheduler.tp_cpu_group)
    return merge(parts)


def _of_rank(pool: Any, scheduler: Any, question: Any) -> dict[str, Any]:
    found: dict[str, Any] = pool.tier.snapshot()
    ranks = scheduler.ps
    here = {"dp_rank": ranks.dp_rank or 0, "tp_rank": ranks.tp_rank}
    found["ranks"] = [{**here, **{name: found[name] for name in _BY_RANK}}]
    if getattr(question, "rid", None) == CHECK:
        found["idle"] = bool(scheduler.is_fully_idle())
        found["problems"] = problems(pool, scheduler) if found["idle"] else None
        if found["idle"] and ranks.tp_size > 1:
            found["problems"] = [f"rank {ranks.tp_rank}: {one}" for one in found["problems"]]
    return found


def problems(pool: Any, scheduler: Any) -> list[str]:
    """Every inconsistency of the tiers, and between them and SGLang's allocator.

    An idle server has two kinds of pages: free ones, of which the tiers know nothing, and those of
    the prefix cache, which are full in every layer.
    """
    found = list(pool.tier.check())
    allocator = scheduler.token_to_kv_pool_allocator
    filled = pool.tier.tier.tables.filled
    held = torch.ones(filled.shape[1], dtype=torch.bool)
    held[allocator.free_pages.cpu()] = False
    held[allocator.release_pages.cpu()] = False
    held[0] = False  # Padding.
    free = ~held
    free[0] = False
    kept = int((filled[:, free] > 0).any(0).sum())
    if kept:
        found.append(f"{kept} free pages still hold tokens")
    partial = int((filled[:, held] != pool.page_size).any(0).sum())
    if partial:
        found.append(f"{partial} pages of the prefix cache are not full in every layer")
    return found


def merge(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One section from those of several ranks: sums, the frames of one layer and the working sets
    too; ``step`` is the newest of any, ``history`` of the first rank, ``ranks`` has all apart."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    total = dict(known[0])
    for part in known[1:]:
        for name, value in part.items():
            if name in (*_COMMON, "history"):
                continue
            if isinstance(value, bool):
                total[name] = total[name] and value
            elif name == "step":
                total[name] = max(total[name], value)
            elif isinstance(value, list) and value and isinstance(value[0], int):
                total[name] = [a + b for a, b in zip(total[name], value, strict=True)]
            elif value is None or total[name] is None:
                total[name] = None
            else:
                total[name] = total[name] + value
    attended = total["hits"] + total["misses"]
    total["hit_rate"] = total["hits"] / attended if attended else 1.0
    return total
