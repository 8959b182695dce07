"""Progressive decode attention in Triton: a fixed sequence of launches, no word to the host.

Forced pages (of a dense row: all) are attended by chunks of a list, the rest is put in order by one
sort, a predicted first group is attended by chunks too, and one program per row and KV head goes on
round by round until its rule stops. Counts, lists and stop flags stay on the device, so a step can
be captured in a CUDA graph. Without ``first_pages`` all groups run in those B * Hkv programs, too
few to fill a GPU when the batch is small: predict the first group there.
"""

from __future__ import annotations

import torch

from sgl_psa_kernels.checks import require
from sgl_psa_kernels.progressive_decode.modes import NUM_STATS
from sgl_psa_kernels.triton_support import (
    dot_dtype,
    head_tile,
    kernels,
    multiprocessors,
    power_of_two,
)

#: A list of pages is cut into chunks of at least so many tokens, and at most so many chunks.
CHUNK_TOKENS = 512
CHUNKS = 64
#: Programs a multiprocessor in a launch over chunks; longer lists take several turns.
PROGRAMS = 8


def tile_pages(page_size: int, tokens: int) -> dict[str, int]:
    """How a tile of at least 16 tokens is made of pages: PAGES of them, PART tokens of each."""
    part = min(page_size, tokens)
    return {"PAGES": tokens // part, "PART": part}


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
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.progressive_decode.progressive_decode`.

    Values on the device are not checked: a page number outside of the pool is an illegal access, a
    mode outside of 0..3 attends forced pages only. Rows with a rule but no ``log_mass`` attend all.
    """
    op, folder = "progressive_decode", "progressive_decode"
    require(
        kappa_start is None and residuals is None,
        f"{op}: backend 'triton' has neither kappa_start nor residuals; use 'torch'",
    )
    given = [q, k_cache, v_cache, page_table, seq_lens, log_mass, mode, threshold]
    given += [kappa_floor, kappa_std, first_pages, attended]
    select = kernels(op, f"{folder}.triton_select", *given)
    attend = kernels(op, f"{folder}.triton_attend", *given)
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
    ints = empty(6, pairs, dtype=torch.int32)
    forced_count, scored, stale_count, group_count, group_end, rounds = ints.unbind()
    listed = empty(pairs, pages, dtype=torch.int32)
    rest, total, kappa = empty(3, pairs, group).unbind()
    moments, state = empty(pairs, 3, group), empty(pairs, group, dim)

    estimates, grouped = log_mass is not None, log_mass is not None and first_pages is not None
    heads = {"HKV": num_kv, "G": group}
    small = heads | {"GT": power_of_two(group), "PAGE": page_size}
    block = min(1024, power_of_two(pages, 16))
    tokens = min(64, max(16, (64 * 256) // power_of_two(dim * q.element_size())))
    tile = tile_pages(page_size, tokens)
    limits = {"LEAST": max(CHUNK_TOKENS // page_size, 1), "CHUNKS": CHUNKS}
    limits["LEAST"] = -(-limits["LEAST"] // tile["PAGES"]) * tile["PAGES"]
    chunks = min(CHUNKS, max(1, -(-pages // limits["LEAST"])))
    turns = max(1, min(chunks, PROGRAMS * multiprocessors(q.device) // pairs))
    wide = heads | {"D": dim, "DT": power_of_two(dim, 16)}
    exact = {
        "GT": head_tile(group),
        "PAGE": page_size,
        "DOT": dot_dtype(q.dtype),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    strides = [*q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], page_table.stride(0)]
    inputs = (q, k_cache, v_cache, page_table, seq_lens)
    part_out, part_lse = empty(pairs, chunks, group, dim), empty(pairs, chunks, group)
    parts = (part_out, part_lse, empty(pairs, chunks, 3, group))

    def attend_chunks(counts: torch.Tensor, forced: bool) -> None:
        flags = {"FORCED": forced, "ESTIMATES": estimates}
        attend.attend_list[(pairs, turns)](
            q, k_cache, v_cache, page_table, seq_lens, mode, log_mass, listed, counts, *parts,
            *strides, pages, chunks, sm_scale, **flags, **wide, **exact, **tile, **limits,
        )  # fmt: skip
        attend.merge_chunks[(pairs, group)](
            mode, counts, *parts, state, lse, moments, chunks,
            **flags, **wide, **limits, PAGES=tile["PAGES"], BLOCK=16,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        select.survey[(pairs,)](
            log_mass, mode, seq_lens,
            listed, forced_count, scored, stale_count, rest, attended,
            pages, sink_pages, max(recent_pages, 1), **small, ESTIMATES=estimates, BLOCK=block,
        )  # fmt: skip
        attend_chunks(forced_count, forced=True)
        order = key = suffix = None
        if estimates:
            key = empty(pairs, pages)
            select.keys[(pairs, -(-pages // block))](
                log_mass, mode, seq_lens, attended, lse, rest, total, key, pages,
                **small, BLOCK=block,
            )  # fmt: skip
            key, order = torch.sort(key, dim=1, descending=True, stable=True)
            suffix = empty(pairs, group, pages)
            select.suffix_masses[(pairs, group)](
                log_mass, mode, scored, order, suffix, pages, **heads, BLOCK=min(block, 256)
            )
        if grouped:
            select.first_group[(pairs,)](
                log_mass, mode, threshold, kappa_floor, kappa_std, first_pages, order, key, suffix,
                lse, total, moments, forced_count, scored,
                listed, group_count, group_end, attended, pages, group_pages,
                **heads, GT=power_of_two(group), BLOCK=min(block, 256),
            )  # fmt: skip
            attend_chunks(group_count, forced=False)
        window = min(2 * tokens, max(16, power_of_two(group_pages) * page_size))
        attend.rounds[(pairs,)](
            *inputs, log_mass, mode, threshold, kappa_floor, kappa_std,
            order, key, suffix, total, moments, scored, group_count, group_end,
            state, lse, attended, out, kappa, rounds,
            *strides, pages, group_pages, sm_scale,
            GROUPED=grouped, ESTIMATES=estimates, **wide, **exact, **tile_pages(page_size, window),
        )  # fmt: skip
        select.statistics[(pairs,)](
            log_mass, mode, seq_lens, attended, lse, kappa, scored, stale_count, rounds, stats,
            pages, **small, ESTIMATES=estimates, BLOCK=block,
        )  # fmt: skip
    return out, lse, stats
