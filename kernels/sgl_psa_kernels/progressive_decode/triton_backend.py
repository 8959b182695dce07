"""Progressive decode attention in Triton: a fixed sequence of launches, no word to the host.

Forced pages (of a dense row: all) are attended by chunks of a list, so are a predicted first group
and, in a number of rounds that follows from the capacity (:func:`wide_rounds`), large groups: a
list of many pages is split over programs, and their results are merged by log-sum-exp. Groups that
are smaller come before them, and what is left when those rounds are over behind them, in one
program per row and KV head, round by round. Counts, lists and stop flags stay on the device, and
shapes follow from the capacity alone, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sgl_psa_kernels.progressive_decode.modes import NUM_STATS
from sgl_psa_kernels.triton_support import (
    PLACE_UNIT,
    dot_dtype,
    head_tile,
    kernels,
    multiprocessors,
    power_of_two,
)

#: A list of pages is cut into chunks of at least so many tokens, and at most so many chunks.
CHUNK_TOKENS = 128
CHUNKS = 64
#: Programs a multiprocessor in a launch over chunks; longer lists take several turns.
PROGRAMS = 8
#: Groups of at least so many tokens are split over programs, in at most so many rounds; later ones
#: are not. Groups that do not grow have the first ``EQUAL_ROUNDS`` of theirs split.
WIDE_TOKENS = 256
WIDE_ROUNDS = 8
EQUAL_ROUNDS = 2
#: Pages that are put in order at a time, and looked at at a time.
WINDOW = 256
STEP = 64


class SharedLists(Protocol):
    """Attends the ends of lists of pages in place of the kernels here."""

    def take(self, listed: torch.Tensor, counts: torch.Tensor, forced: bool) -> torch.Tensor:
        """Take from ``listed`` [R, M], the first ``counts`` int32 [R] pages of each; returns how
        many of the first ones are left, 0 <= left <= counts."""

    def merge(
        self, counts: torch.Tensor, left: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Merge the attention of what was taken into out float32 [R, G, D] and lse [R, G]."""


def tile_pages(page_size: int, tokens: int) -> dict[str, int]:
    """How a tile of at least 16 tokens is made of pages: PAGES of them, PART tokens of each."""
    part = min(page_size, tokens)
    return {"PAGES": tokens // part, "PART": part}


def wide_rounds(pages: int, wide_pages: int, group_pages: int, group_percent: int) -> int:
    """Rounds of groups of ``wide_pages`` and more, split over programs, in which a row of ``pages``
    pages can be attended to its end, or as many as there may be."""
    if not group_percent:
        return EQUAL_ROUNDS if group_pages >= wide_pages else 0
    done = 0 if group_pages >= wide_pages else -(-wide_pages * 100 // group_percent)
    rounds = 0
    while done < pages and rounds < WIDE_ROUNDS:
        done += max(wide_pages, group_pages, done * group_percent // 100)
        rounds += 1
    return rounds


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
    place: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    shared: SharedLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`.

    Values on the device are not checked: a page number outside of the pool is an illegal access, a
    mode outside of 0..3 attends forced pages only. Rows with a rule but no ``log_mass`` attend all.

    Args:
        place: None, or int64 [pages], where the record [2, Hkv, page_size, D] of a physical page
            begins, in units of ``PLACE_UNIT`` elements from the first element of ``k_cache``: keys
            there, values as far from the first element of ``v_cache``. The caches are then
            [any, Hkv, page_size, D] views of keys and values of records that lie one by one.
        codes: None, or int8, the bytes of all of them: pages that begin elsewhere are then records
            of ``page_tier/codec.py``.
        shared: None, or what attends a part of every list.
        The others: as there.
    """
    op, folder = "progressive_decode", "progressive_decode"
    given = [q, k_cache, v_cache, page_table, seq_lens, log_mass, mode, threshold]
    given += [kappa_floor, kappa_std, first_pages, attended, kappa_start, residuals, place, codes]
    select = kernels(op, f"{folder}.triton_select", *given)
    attend = kernels(op, f"{folder}.triton_attend", *given)
    loop = kernels(op, f"{folder}.triton_rounds", *given)
    batch, num_q, dim = q.shape
    num_kv, pages = k_cache.shape[1], page_table.shape[1]
    group, pairs = num_q // num_kv, batch * num_kv

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    out = empty(batch, num_q, dim, dtype=q.dtype)
    lse, stats = empty(batch, num_q), empty(batch, num_kv, NUM_STATS)
    if pairs == 0:
        return out, lse, stats
    if attended is None:
        attended = empty(pairs, pages, dtype=torch.uint8)
    else:
        attended.zero_()
    if residuals is not None:
        residuals.zero_()
    ints = empty(4, pairs, dtype=torch.int32)
    forced_count, scored, stale_count, group_count = ints.unbind()
    progress = empty(pairs, int(select.COLUMNS), dtype=torch.int32)
    listed = empty(pairs, pages, dtype=torch.int32)
    rest, total, kappa = empty(3, pairs, group).unbind()
    latest, seen = empty(2, pairs, 3, group).unbind()
    state = empty(pairs, group, dim)

    estimates, told = log_mass is not None, log_mass is not None and residuals is not None
    wide_pages = max(1, WIDE_TOKENS // page_size)
    split = wide_rounds(pages, wide_pages, group_pages, group_percent) if estimates else 0
    predicted = estimates and first_pages is not None
    heads = {"HKV": num_kv, "G": group}
    small = heads | {"GT": power_of_two(group), "PAGE": page_size}
    # Blocks of pages: of tiles with all heads, of keys alone, and of a launch over blocks.
    block = max(16, min(8192 // power_of_two(group), power_of_two(pages, 16)))
    lines, part = min(2048, power_of_two(pages, 16)), min(256, power_of_two(pages, 16))
    tokens = min(64, max(16, (64 * 256) // power_of_two(dim * q.element_size())))
    tile = tile_pages(page_size, tokens)
    limits = {"LEAST": max(CHUNK_TOKENS // page_size, 1), "CHUNKS": CHUNKS}
    limits["LEAST"] = -(-limits["LEAST"] // tile["PAGES"]) * tile["PAGES"]
    chunks = min(CHUNKS, max(1, -(-pages // limits["LEAST"])))
    turns = max(1, min(chunks, PROGRAMS * multiprocessors(q.device) // pairs))
    outputs = heads | {"D": dim, "DT": power_of_two(dim, 16)}
    exact = {
        "GT": head_tile(group),
        "PAGE": page_size,
        "DOT": dot_dtype(q.dtype),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    # Places begin within the arena, or where pages are in int8.
    unit = PLACE_UNIT * q.element_size() if codes is not None else 0
    arena = codes.numel() // unit if codes is not None else 0
    tiered = {"TIERED": place is not None, "INT8": unit}
    cache_strides = [*k_cache.stride()[:2], *v_cache.stride()[:2]]
    if place is not None:
        cache_strides = [PLACE_UNIT, page_size * dim] * 2
    strides = [*q.stride()[:2], *cache_strides, page_table.stride(0)]
    inputs = (q, k_cache, v_cache, page_table, seq_lens, place, codes, arena)
    part_out, part_lse = empty(pairs, chunks, group, dim), empty(pairs, chunks, group)
    parts = (part_out, part_lse, empty(pairs, chunks, 3, group))

    flags = {"ESTIMATES": estimates, "TOLD": told}
    started = {"STARTED": estimates and kappa_start is not None}

    def attend_chunks(counts: torch.Tensor, forced: bool) -> None:
        mine = shared.take(listed, counts, forced) if shared else counts
        attend.attend_list[(pairs, turns)](
            *inputs, mode, log_mass, listed, mine, *parts,
            *strides, pages, chunks, sm_scale,
            FORCED=forced, **flags, **outputs, **exact, **tile, **limits, **tiered,
        )  # fmt: skip
        attend.merge_chunks[(pairs, group)](
            mode, mine, *parts, state, lse, latest, seen, chunks,
            FORCED=forced, **flags, **outputs, **limits, PAGES=tile["PAGES"], BLOCK=16,
        )  # fmt: skip
        if shared:
            shared.merge(counts, mine, state, lse)

    with torch.cuda.device_of(q):
        select.survey[(pairs,)](
            log_mass, mode, seq_lens,
            listed, forced_count, scored, stale_count, rest, attended, progress,
            pages, sink_pages, max(recent_pages, 1), **small, ESTIMATES=estimates, BLOCK=block,
            num_warps=8,
        )  # fmt: skip
        attend_chunks(forced_count, forced=True)
        key = found = order = suffix = None
        window = {"WINDOW": min(WINDOW, power_of_two(pages, 16)), "BLOCK": lines}
        window["STEP"] = min(STEP, window["WINDOW"])
        if estimates:
            key = empty(pairs, pages, dtype=torch.int32)
            found, order = empty(2, pairs, 2, window["WINDOW"], dtype=torch.int32).unbind()
            suffix = empty(pairs, group, window["WINDOW"] + 1)
            select.keys[(pairs, -(-pages // part))](
                log_mass, mode, seq_lens, attended, lse, rest, total, key, pages,
                **small, BLOCK=part,
            )  # fmt: skip

        def attend_wide(first: bool) -> None:
            select.next_group[(pairs,)](
                log_mass, mode, seq_lens, threshold, kappa_floor, kappa_std, kappa_start,
                first_pages, key, found, order, suffix, lse, total, latest, seen,
                scored, progress, listed, group_count, attended, pages, group_pages, group_percent,
                FIRST=first, PREDICTED=predicted, **started, **small, **window, num_warps=8,
            )  # fmt: skip
            attend_chunks(group_count, forced=False)

        def attend_alone(only_small: bool, grouped: bool) -> None:
            loop.rounds[(pairs,)](
                *inputs, log_mass, mode, threshold, kappa_floor, kappa_std, kappa_start,
                key, found, order, suffix, lse, total, latest, seen, scored, progress, group_count,
                listed, state, attended, out, kappa, residuals,
                *strides, pages, group_pages, group_percent, wide_pages, sm_scale,
                SMALL=only_small, GROUPED=grouped, **started, **flags, **outputs, **exact, **tile,
                **window, **tiered, num_warps=8,
            )  # fmt: skip

        if predicted:
            attend_wide(True)
        small_first = split > 0 and group_pages < wide_pages
        if small_first:
            attend_alone(True, predicted)
        for number in range(split):
            attend_wide(number == 0 and not predicted and not small_first)
        attend_alone(False, predicted or split > 0)
        select.statistics[(pairs,)](
            log_mass, mode, seq_lens, attended, lse, kappa, scored, stale_count, progress, stats,
            pages, **small, ESTIMATES=estimates, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out, lse, stats
