"""Candidate pages: where a second, finer level of scoring is worth its bytes."""

from typing import NamedTuple

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.candidate_pages import cpu, reference, triton_backend
from sgl_psa_kernels.candidate_pages.cpu import PreparedChoice


class CandidatePages(NamedTuple):
    """Chosen pages.

    Attributes:
        flags: uint8 [B, Hkv, max_pages], 1 for candidates.
        count: int32 [B, Hkv], how many they are.
    """

    flags: torch.Tensor
    count: torch.Tensor


_IMPLEMENTATIONS = {
    "reference": reference.choose_checked,
    "torch": reference.choose,
    "cpu": cpu.choose,
    "triton": triton_backend.choose,
}


def candidate_pages(
    log_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    num_kv_heads: int,
    page_size: int,
    count: int,
    backend: str,
) -> CandidatePages:
    """The ``count`` pages of each KV head that have the largest share of the estimated mass under
    any query head of its group; of equal shares that of the lower page.

    A share is relative to the pages of the row that have an estimate. Shares are float32: those
    that differ by its rounding may be ranked differently by different backends.

    A count and not a distance in nats from the best page: the error of estimates grows with the
    length of queries and keys, and reaches ten nats in heads that look single keys up.

    Args:
        log_mass: float32 [B, Hq, max_pages], estimated log masses. Pages with +inf (attended
            anyway) for all heads of a group are no candidates.
        seq_lens: int32 [B], tokens.
        active: uint8 [B]; rows with 0 have no candidates.
        num_kv_heads: query head h uses KV head h // (Hq // num_kv_heads).
        page_size: tokens per page.
        count: most candidates of a row and KV head, at least 1.
        backend: "reference", "torch" (any device), "cpu" (C++) or "triton" (CUDA).

    Returns:
        Rows with fewer usable pages than ``count`` have fewer candidates.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes, sequences longer than the pages ("torch"
            and "triton" do not look).
        RuntimeError: backend "cpu" without a usable native library, "triton" without a CUDA device.
    """
    op = "candidate_pages"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.check_page_size(op, page_size)
    checks.check_tensor(op, "log_mass", log_mass, torch.float32, (None, None, None))
    checks.require(
        num_kv_heads > 0 and log_mass.shape[1] % num_kv_heads == 0,
        f"{op}: {log_mass.shape[1]} query heads are no multiple of {num_kv_heads} KV heads",
    )
    checks.require(count >= 1, f"{op}: count must be at least 1, got {count}")
    checks.check_tensor(op, "seq_lens", seq_lens, torch.int32, (log_mass.shape[0],))
    checks.check_tensor(op, "active", active, torch.uint8, (log_mass.shape[0],))
    return CandidatePages(
        *implementation(log_mass, seq_lens, active, num_kv_heads, page_size, count)
    )


__all__ = ["CandidatePages", "PreparedChoice", "candidate_pages"]
