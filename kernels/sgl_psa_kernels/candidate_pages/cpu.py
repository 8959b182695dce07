"""Candidate pages: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, call, require_cpu


def choose(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.candidate_pages.candidate_pages`."""
    op = "candidate_pages"
    require_cpu(op, log_mass, seq_lens, active)
    batch, num_qo_heads, max_pages = log_mass.shape
    flags = torch.empty(batch, num_kv_heads, max_pages, dtype=torch.uint8)
    chosen = torch.empty(batch, num_kv_heads, dtype=torch.int32)
    args = abi.CandidateArgs(
        batch=batch,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        max_pages=max_pages,
        count=min(count, max_pages),
        num_threads=torch.get_num_threads(),
        log_mass=log_mass.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        active=active.data_ptr(),
        candidates=flags.data_ptr(),
        chosen=chosen.data_ptr(),
    )
    call(op, "psa_candidate_pages", args)
    return flags, chosen


class PreparedChoice:
    """:func:`sgl_psa_kernels.candidate_pages.candidate_pages` of one batch, layer after layer.

    Attributes:
        flags: uint8 [B, Hkv, max_pages], those of the newest call.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        seq_lens: torch.Tensor,
        active: torch.Tensor,
        *,
        num_kv_heads: int,
        page_size: int,
        count: int,
    ) -> None:
        """
        Args:
            shape: of the log masses, [B, Hq, max_pages].
        """
        batch, num_qo_heads, max_pages = shape
        self.flags = torch.empty(batch, num_kv_heads, max_pages, dtype=torch.uint8)
        self._keep = (seq_lens, active)
        args = abi.CandidateArgs(
            batch=batch,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            max_pages=max_pages,
            count=min(count, max_pages),
            num_threads=torch.get_num_threads(),
            seq_lens=seq_lens.data_ptr(),
            active=active.data_ptr(),
            candidates=self.flags.data_ptr(),
        )
        self._call = PreparedCall("candidate_pages", "psa_candidate_pages", args)

    def __call__(self, log_mass: torch.Tensor, chosen: torch.Tensor, layer: int) -> None:
        """Write ``flags``, and their numbers to ``chosen[layer]``, int32 [L, B, Hkv]."""
        self._call.args.log_mass = log_mass.data_ptr()
        self._call.args.chosen = chosen.data_ptr() + layer * chosen.stride(0) * 4
        self._call()
