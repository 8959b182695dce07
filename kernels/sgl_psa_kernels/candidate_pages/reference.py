"""Candidate pages in plain torch, for any device: the specification."""

import torch

from sgl_psa_kernels import checks


def choose(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.candidate_pages.candidate_pages`."""
    place = torch.arange(log_mass.shape[2], device=log_mass.device)
    inside = (place * page_size < seq_lens[:, None]) & (active[:, None] != 0)
    heads = log_mass.unflatten(1, (num_kv_heads, -1))
    usable = inside[:, None, None] & (heads < float("inf"))
    heads = heads.masked_fill(~usable, float("-inf"))
    flags = usable.any(2)
    if count < flags.shape[-1]:
        total = heads.logsumexp(-1, keepdim=True)
        share = (heads - total.masked_fill(total.isneginf(), 0.0)).amax(2)
        # Pages that cannot be candidates last, equal shares in the order of the pages.
        ranked = share.nan_to_num().masked_fill(~flags, float("-inf"))
        ranked = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        flags &= torch.zeros_like(flags).scatter_(-1, ranked, True)
    return flags.to(torch.uint8), flags.sum(-1, dtype=torch.int32)


def choose_checked(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`choose`, with a look at the lengths, which a device would have to wait for."""
    for row in active.nonzero().flatten().tolist():
        checks.check_row_length(
            "candidate_pages", row, int(seq_lens[row]), log_mass.shape[2], page_size
        )
    return choose(log_mass, seq_lens, active, num_kv_heads, page_size, count)
