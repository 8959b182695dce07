"""Candidate pages: binding of the C++ kernel."""

from collections.abc import Sequence

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, require_cpu


def choose(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.candidate_pages.candidate_pages`."""
    require_cpu("candidate_pages", log_mass, seq_lens, active)
    choice = PreparedChoice(
        log_mass.shape,
        seq_lens,
        active,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        count=count,
    )
    chosen = torch.empty(1, *choice.flags.shape[:2], dtype=torch.int32)
    choice(log_mass, chosen, 0)
    return choice.flags, chosen[0]


class PreparedChoice:
    """:func:`sgl_psa_kernels.candidate_pages.candidate_pages` of one batch, layer after layer.

    Attributes:
        flags: uint8 [B, Hkv, max_pages], those of the newest call.
    """

    def __init__(
        self,
        shape: Sequence[int],
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
