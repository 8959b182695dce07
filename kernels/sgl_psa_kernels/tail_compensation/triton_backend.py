"""Tail compensation in Triton."""

from __future__ import annotations

import torch

from sgl_psa_kernels.triton_support import head_tile, kernels, power_of_two

#: Pages of a chunk, and of a tile.
CHUNK = 256
PAGES = 32


def compensate(
    out: torch.Tensor,
    lse: torch.Tensor,
    log_mass: torch.Tensor,
    attended: torch.Tensor,
    value_means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    page_size: int,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.tail_compensation.compensate`; page numbers are not checked."""
    given = (log_mass, attended, value_means, page_table, seq_lens, active)
    op = "tail_compensation"
    module = kernels(op, "tail_compensation.triton_kernels", out, lse, *given)
    batch, num_q, dim = out.shape
    num_kv, pages = value_means.shape[1], page_table.shape[1]
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    pairs, group, chunks = batch * num_kv, num_q // num_kv, max(1, -(-pages // CHUNK))
    if result.numel() == 0:
        return result
    options = {"dtype": torch.float32, "device": out.device}
    part_out = torch.empty(pairs, chunks, group, dim, **options)
    part_lse = torch.empty(pairs, chunks, group, **options)
    part_left = torch.empty(pairs, chunks, dtype=torch.int32, device=out.device)
    parts = (part_out, part_lse, part_left)
    sizes = {"HKV": num_kv, "G": group, "D": dim, "DT": power_of_two(dim, 16), "PAGE": page_size}
    with torch.cuda.device_of(out):
        module.partial[(pairs, chunks)](
            *given, *parts, *value_means.stride()[:2], page_table.stride(0), pages, chunks,
            **sizes, GT=head_tile(group), PAGES=PAGES, CHUNK=CHUNK,
        )  # fmt: skip
        module.finish[(pairs, group)](
            out, lse, seq_lens, active, *parts, result, *out.stride()[:2], chunks,
            **sizes, CHUNK=CHUNK, BLOCK=16,
        )  # fmt: skip
    return result
