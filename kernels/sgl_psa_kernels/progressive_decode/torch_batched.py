"""Progressive decode attention for any torch device: all rows and KV heads in step.

The route for GPUs without a fused kernel. Rounds are batched over (row, KV head); a pair that has
stopped contributes an empty list. One scalar a round crosses to the host: whether anybody goes on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_psa_kernels.progressive_decode.modes import (
    CONSERVATIVE,
    COVERAGE,
    DENSE,
    MARGINAL,
    NUM_STATS,
)

INF = float("inf")
#: Pages gathered at once; bounds the memory of a dense row.
CHUNK = 64


class Pages(NamedTuple):
    """Keys and values of R = B * Hkv (row, KV head) pairs, addressed by logical page.

    Attributes:
        k, v: [pages, P, Hkv, D] views of the pool.
        table: int64 [R, M], physical page; 0 where the row has no such page.
        tokens: int64 [R, M], tokens of the page in use, 0 where the row has no such page.
        head: int64 [R].
        q: float32 [R, G, D], scaled.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    tokens: torch.Tensor
    head: torch.Tensor
    q: torch.Tensor


class State:
    """What each pair has attended: out [R, G, D], lse [R, G], and the pages done [R, M]."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.out = torch.zeros_like(pages.q)
        self.lse = torch.full_like(pages.q[..., 0], -INF)
        self.done = torch.zeros_like(pages.table, dtype=torch.bool)

    def attend(self, index: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Attend the logical pages ``index`` int64 [R, K] where ``wanted`` bool [R, K].

        Returns:
            Exact log masses [R, G, K], -inf where not wanted.
        """
        parts = [
            self._attend(index[:, i : i + CHUNK], wanted[:, i : i + CHUNK])
            for i in range(0, index.shape[1], CHUNK)
        ]
        # An unwanted entry may name a page that is wanted elsewhere in the list.
        hits = torch.zeros_like(self.done, dtype=torch.int32).scatter_add_(1, index, wanted.int())
        self.done |= hits > 0
        return torch.cat(parts, -1)

    def _attend(self, index: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        p = self.pages
        table = p.table.gather(1, index)
        used = torch.where(wanted, p.tokens.gather(1, index), 0)
        position = torch.arange(p.k.shape[1], device=index.device)
        live = position < used[..., None]  # [R, K, P]
        head = p.head[:, None].expand_as(table)
        k = p.k[table, :, head].to(p.q.dtype)  # [R, K, P, D]
        v = p.v[table, :, head].to(p.q.dtype).masked_fill(~live[..., None], 0.0)
        logits = torch.einsum("rgd,rkpd->rgkp", p.q, k).masked_fill(~live[:, None], -INF)
        mass = torch.logsumexp(logits, -1)
        lse = torch.logaddexp(self.lse, torch.logsumexp(mass, -1))
        # A pair that has attended nothing yet has lse -inf on both sides; its weights stay 0.
        safe = torch.where(lse == -INF, torch.zeros_like(lse), lse)
        weights = torch.exp(logits - safe[..., None, None])
        self.out = self.out * torch.exp(self.lse - safe)[..., None]
        self.out += torch.einsum("rgkp,rkpd->rgd", weights, v)
        self.lse = lse
        return mass


def residual_sums(exact: torch.Tensor, estimate: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of exact minus estimated log masses, float64 [3, R, G].

    Of the pages [R, G, K] where ``valid`` [R, K] and where there is an estimate.
    """
    mask = valid[:, None] & torch.isfinite(estimate)
    x = (exact.double() - estimate.double()).masked_fill(~mask, 0.0)
    return torch.stack([mask.sum(-1), x.sum(-1), x.square().sum(-1)])


def correction(sums: torch.Tensor, std: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    """kappa [R, G] from sums [3, R, G]: mean + std * deviation, at least ``lowest`` [R, G]."""
    count, total, square = sums[0].clamp(min=1), sums[1], sums[2]
    mean = total / count
    spread = (square / count - mean.square()).clamp(min=0).sqrt()
    return torch.maximum((mean + std[:, None] * spread).to(lowest.dtype), lowest)


def _first(wanted: torch.Tensor, order: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """The first ``count`` wanted pages of each row in ``order``: (index, valid), [R, count]."""
    in_order = wanted.gather(1, order)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.where(in_order, place, order.shape[1])
    first = rank.topk(min(count, order.shape[1]), dim=1, largest=False, sorted=True).values
    valid = first < order.shape[1]
    return order.gather(1, first.clamp(max=order.shape[1] - 1)), valid


def progressive_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    log_mass: torch.Tensor | None,
    mode: torch.Tensor,
    threshold: torch.Tensor,
    kappa_floor: torch.Tensor,
    kappa_std: torch.Tensor,
    *,
    page_size: int,
    sm_scale: float,
    sink_pages: int,
    recent_pages: int,
    group_pages: int,
    group_percent: int = 0,
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`."""
    batch, num_q, dim = q.shape
    num_kv = k_cache.shape[1]
    group, max_pages = num_q // num_kv, page_table.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    place = torch.arange(max_pages, device=q.device)

    def pairs(rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(num_kv, 0)

    count = pairs(torch.div(seq_lens + page_size - 1, page_size, rounding_mode="floor").long())
    exists = place < count[:, None]
    tokens = (pairs(seq_lens.long())[:, None] - place * page_size).clamp(0, page_size)
    pages = Pages(
        k_cache.unflatten(0, (-1, page_size)),
        v_cache.unflatten(0, (-1, page_size)),
        torch.where(exists, pairs(page_table.long()), 0),
        tokens,
        torch.arange(num_kv, device=q.device).repeat(batch),
        (q.to(work) * sm_scale).view(batch * num_kv, group, dim),
    )
    state = State(pages)
    rule = [pairs(t) for t in (mode, threshold, kappa_floor, kappa_std)]
    kind, limit, floor, std = rule
    sparse = kind != DENSE
    if log_mass is None:
        estimate = torch.full((batch * num_kv, group, max_pages), INF, device=q.device, dtype=work)
    else:
        estimate = log_mass.to(work).view(batch * num_kv, group, max_pages)
    stale = ~(estimate < INF).all(1) & exists & sparse[:, None]
    forced = (place < sink_pages) | (place >= count[:, None] - max(recent_pages, 1)) | stale
    forced = (forced | ~sparse[:, None]) & exists
    known, safe = estimate, kind == CONSERVATIVE
    by_coverage = safe | (kind == COVERAGE)
    estimate = torch.where((exists & ~forced)[:, None], estimate, -INF)

    logical = place.expand(batch * num_kv, -1)
    index, valid = _first(forced, logical, int(forced.sum(1).max()) if batch else 0)
    seen = state.lse.new_zeros(3, *state.lse.shape, dtype=torch.float64)
    if index.shape[1]:
        exact = state.attend(index, valid)
        fresh = valid & by_coverage[:, None] & ~stale.gather(1, index)
        seen += residual_sums(exact, known.gather(2, index[:, None].expand_as(exact)), fresh)
    total = torch.logaddexp(state.lse, torch.logsumexp(estimate, -1))
    key = (estimate - total[..., None]).amax(1)
    order = torch.argsort(key, dim=1, descending=True, stable=True)
    scored = (exists & ~forced).sum(1) * sparse
    rounds = torch.zeros_like(count)
    lowest, kappa = floor[:, None].expand_as(state.lse), torch.zeros_like(state.lse)
    if kappa_start is not None:
        lowest = lowest.maximum(kappa_start.to(work).view(lowest.shape))
        kappa = torch.where((kind == COVERAGE)[:, None], lowest, kappa)
    kappa = torch.where(safe[:, None], correction(seen, std, lowest), kappa)
    running = sparse & (scored > 0)
    ends = None if first_pages is None else first_pages.flatten().long()
    # No row of those that run has attended more pages than this, as far as the host knows.
    most = int((forced & sparse[:, None]).sum(1).max()) if batch and group_percent else 0
    predicted = min(int(ends.max()), max_pages) if batch and ends is not None else 0
    while True:
        left = exists & ~state.done & running[:, None]
        worth = (estimate > (state.lse + limit[:, None])[..., None]).any(1)
        rest = torch.logsumexp(estimate.masked_fill(~left[:, None], -INF), -1)
        covered = (rest + kappa <= state.lse + limit[:, None]).all(1)
        wanted = left & torch.where((kind == MARGINAL)[:, None], worth, ~covered[:, None])
        running = wanted.any(1)
        if not bool(running.any()):
            break
        size = min(max(group_pages, most * group_percent // 100, predicted), max_pages)
        index, valid = _first(wanted, order, size)
        done = state.done.sum(1)
        room = (done * group_percent // 100).clamp(min=group_pages)
        if ends is not None:
            room = room.maximum(ends - done)
        valid &= place[: valid.shape[1]] < room[:, None]
        ends, predicted, most = None, 0, min(most + size, max_pages)
        exact = state.attend(index, valid)
        rounds += running
        guess = known.gather(2, index[:, None].expand_as(exact))
        latest = residual_sums(exact, guess, valid & by_coverage[:, None])
        seen += latest
        new = correction(torch.where(safe[:, None], seen, latest), std, lowest)
        kappa = torch.where((running & by_coverage)[:, None], new, kappa)

    rest = estimate.masked_fill((state.done | ~exists)[:, None], -INF)
    remaining = torch.logsumexp(rest, -1) + kappa
    coverage = torch.sigmoid(state.lse - remaining).amin(1)
    coverage = torch.where(remaining.amax(1) == -INF, torch.ones_like(coverage), coverage)
    read = state.done & exists
    if attended is not None:
        attended.copy_(read.view(attended.shape))
    if residuals is not None:
        residuals.copy_(seen.movedim(0, -1).view(residuals.shape))
    columns = [
        read.sum(1),
        (read * tokens).sum(1),
        scored,
        rounds,
        coverage,
        stale.sum(1),
    ]
    stats = torch.stack([c.to(torch.float32) for c in columns], -1) * (count > 0)[:, None]
    out = state.out.to(q.dtype).view(batch, num_q, dim)
    return out, state.lse.view(batch, num_q), stats.view(batch, num_kv, NUM_STATS)
