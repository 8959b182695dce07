"""Made-up keys and queries with a known share of the pages holding a head's attention mass.

Keys are runs of tokens on one topic plus noise of their own, with a few large channels and a sink,
rotated by position as a model's are. Half of a query's hot keys are topics, which a summary of a
page can see, half single tokens, which it cannot ("mixed"). Query heads of a KV head share most of
their hot keys, not all, so that their group needs more pages than each of them.
"""

from __future__ import annotations

import torch

ROPE_BASE = 500000.0
HOT_SHARE = 0.03
HOT_MASS = 0.95
HOT_PAGE = 32
"""A query head has ``HOT_MASS`` of its mass in ``HOT_SHARE`` of the runs of ``HOT_PAGE`` tokens."""
_BACKGROUND_STD = 1.2
_HALVINGS = 24


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``x`` [N, D] at ``positions`` [N]."""
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-torch.arange(half) / half)
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def hot_share(logits: torch.Tensor, page: int = HOT_PAGE) -> float:
    """Share of pages that it takes to hold ``HOT_MASS`` of a head's mass; ``logits`` [tokens]."""
    mass = torch.softmax(logits, -1).view(-1, page).sum(1)
    covered = mass.sort(descending=True).values.cumsum(0)
    return (int((covered < HOT_MASS).sum()) + 1) / len(mass)


def mixed(
    tokens: int, *, kv_heads: int, group: int, dim: int, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of one request and the queries of its newest token.

    Args:
        tokens: a multiple of ``HOT_PAGE``.
        group: query heads a KV head.

    Returns:
        k bf16 [tokens, Hkv, D] and q bf16 [Hkv * group, D]; softmax scale D ** -0.5.
    """
    rng = torch.Generator().manual_seed(seed)
    positions = torch.arange(tokens)
    made = [_head(tokens, positions, group, dim, rng) for _ in range(kv_heads)]
    k = torch.stack([keys for keys, _ in made], 1).bfloat16()
    return k, torch.cat([queries for _, queries in made]).bfloat16()


def _head(
    tokens: int, positions: torch.Tensor, group: int, dim: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys float32 [tokens, D] and queries [group, D] of one KV head."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    def some(count: int, limit: int) -> torch.Tensor:
        return torch.randint(limit, (count,), generator=rng)

    large = torch.ones(dim)
    # Large channels sit where the rotation is slow: at the end of each half.
    slow = dim // 2 - dim // 6
    large[slow + some(6, dim // 6)] = 5.0
    large[dim // 2 + slow + some(3, dim // 6)] = 5.0
    bias = normal(dim) * large
    spans = (-torch.log(torch.rand(tokens // 8 + 16, generator=rng)) * 48).long() + 4
    topic_of = torch.repeat_interleave(torch.arange(len(spans)), spans)[:tokens]
    topics, own = normal(int(topic_of[-1]) + 1, dim), normal(tokens, dim)
    sink = normal(dim) * 2
    keys = bias + topics[topic_of] * 0.6 + own * 0.8
    keys[:4] += sink
    keys = rotate(keys, positions).bfloat16().float()
    scale = dim**-0.5
    shared_topics, shared_tokens = some(3, len(topics)), some(3, tokens)
    queries = []
    for _ in range(group):
        at = torch.cat([shared_topics, some(2, len(topics))])
        tokens_at = torch.cat([shared_tokens, some(2, tokens)])
        weights = (torch.rand(5, generator=rng) * 0.6 + 0.7)[:, None]
        hot = ((topics[at] + own[tokens_at]) * weights).sum(0) + 0.5 * sink + 0.7 * topics[-1]
        base, hot = rotate(
            torch.stack([0.15 * bias + normal(dim) * 0.6, hot]), positions[-1:].expand(2)
        )
        flat = keys @ base * scale
        base = base * (_BACKGROUND_STD / flat.std())
        flat, spiky = keys @ base * scale, keys @ hot * scale
        low, high = 0.001, 20.0
        for _ in range(_HALVINGS):
            weight = (low * high) ** 0.5
            if hot_share(flat + spiky * weight) > HOT_SHARE:
                low = weight
            else:
                high = weight
        queries.append(base + hot * weight)
    return keys, torch.stack(queries)
