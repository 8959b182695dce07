"""Ranking of pages by what a policy knows of them."""

from __future__ import annotations

import torch

from sgl_psa.policies.base import Candidates

_LOWEST = -1e30


def log_shares(candidates: Candidates) -> torch.Tensor:
    """Log of the estimated share of each page in its query head's mass, float64 [R, Hkv, G, M].

    Pages that do not exist have -inf; so have pages without a usable estimate, which are forced.
    """
    estimate = candidates.log_mass
    assert estimate is not None, "the policy reads scores"
    usable = (estimate < torch.inf) & candidates.exists[:, :, None]
    estimate = estimate.double().masked_fill(~usable, -torch.inf)
    total = torch.logsumexp(estimate, -1, keepdim=True)
    return torch.where(usable, estimate - total, -torch.inf).nan_to_num(nan=-torch.inf)


def best(key: torch.Tensor, allowed: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The ``count`` allowed pages of the largest keys, the earlier page first among equals.

    Args:
        key: [R, Hkv, M].
        allowed: bool [R, Hkv, M].
        count: int64 [R, Hkv, 1]; fewer where fewer are allowed, none where it is not positive.

    Returns:
        bool [R, Hkv, M].
    """
    key = torch.where(allowed, key.clamp(min=_LOWEST), -torch.inf)
    order = torch.argsort(key, dim=-1, descending=True, stable=True)
    place = torch.arange(key.shape[-1], device=key.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return allowed & (rank < count)
