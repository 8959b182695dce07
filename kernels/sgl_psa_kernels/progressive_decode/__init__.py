"""Decode attention that reads pages in order of estimated mass and stops by rule.

Source of the idea: Progressive Sparse Attention (PSA): attend pages group by group, merge each
group exactly by log-sum-exp, and stop once the estimated attention mass of what is left is small.
The rule "coverage" is PSA's; "marginal" stops when no single remaining page is worth reading.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.progressive_decode import (
    cpu,
    flashinfer_backend,
    reference,
    torch_batched,
    triton_backend,
)
from sgl_psa_kernels.progressive_decode.arguments import DecodeArguments
from sgl_psa_kernels.progressive_decode.modes import (
    CONSERVATIVE,
    COVERAGE,
    DENSE,
    MARGINAL,
    NUM_STATS,
    STAT_NAMES,
)

_IMPLEMENTATIONS = {
    "reference": reference.progressive_decode,
    "torch": torch_batched.progressive_decode,
    "cpu": cpu.progressive_decode,
    "triton": triton_backend.progressive_decode,
    "flashinfer": flashinfer_backend.progressive_decode,
}


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
    backend: str,
    group_percent: int = 0,
    first_pages: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    kappa_start: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one query token per row over the pages that the row's rule selects.

    The G = Hq // Hkv query heads of a KV head share one selection. Forced pages (the first
    ``sink_pages``, the last ``recent_pages``, the last page, and every page whose ``log_mass`` is
    +inf) are attended first; then groups of pages in order of their largest normalised estimated
    mass, until the rule of the row stops. ``reference.py`` is the exact specification. Slots behind
    ``seq_lens`` and page table entries behind the last page of a row are never read.

    Args:
        q: [B, Hq, D] bf16 | fp16 | fp32; query head h uses KV head h // G.
        k_cache, v_cache: [slots, Hkv, D], the dtype of q, slots a multiple of ``page_size``.
        page_table: int32 [B, max_pages], physical page of each logical page.
        seq_lens: int32 [B], tokens including the current one; 0 = padding row.
        log_mass: float32 [B, Hq, max_pages], estimated log mass of every page, or None when every
            row is dense.
        mode: int32 [B]: 0 dense, 1 marginal, 2 coverage, 3 conservative coverage.
        threshold: float32 [B]: marginal: log(delta); both coverages: log((1 - p) / p).
        kappa_floor: float32 [B], coverages only: lower clamp of the correction kappa of the
            estimated rest. kappa follows from the residuals, exact minus estimated log masses: of
            the last group (coverage, before the first group 0), or of every page attended so far,
            forced pages included (conservative).
        kappa_std: float32 [B], coverages only: multiple of the standard deviation in kappa.
        page_size: tokens per page, a power of two.
        sm_scale: softmax scale, usually D ** -0.5.
        sink_pages, recent_pages: first and last pages that are always attended, >= 0.
        group_pages: least pages per round, >= 1.
        backend: "reference", "torch" (any device), "cpu" (C++), "triton" or "flashinfer" (CUDA;
            Triton's with lists of pages attended by FlashInfer).
        group_percent: a group has as many pages as this percentage, >= 0, of those attended before
            it, rounded down, where that is more than ``group_pages``: rounds are then few where
            budgets are large.
        first_pages: int32 [B, Hkv], the prediction that makes one round enough: the first group
            is as large as it takes to have attended this many pages after it, forced ones
            included, and at least what a group has otherwise.
        attended: uint8 [B, Hkv, max_pages], contiguous, written if given: 1 for every page that
            was attended, 0 for all others.
        kappa_start: float32 [B, Hq], coverages only, not NaN: a correction known beforehand. It is
            in force before the first group, and kappa is never below it. None: as said at
            ``kappa_floor``.
        residuals: float32 [B, Hq, 3], contiguous, written if given: count, sum and sum of squares
            of the residuals of all pages attended that have an estimate, forced pages included. 0
            for rows without a coverage rule.

    Returns:
        out [B, Hq, D] in the dtype of q; lse float32 [B, Hq], natural log, of what was attended;
        stats float32 [B, Hkv, 6] named by ``STAT_NAMES``. Padding rows: 0, -inf, 0.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes, a mode outside of 0..3, a row with rule
            but no ``log_mass``, sequences longer than the page table, page numbers outside of the
            pool.
        RuntimeError: backend "cpu" without a usable native library, "triton" or "flashinfer"
            without a CUDA device, "flashinfer" without FlashInfer.
    """
    op = "progressive_decode"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.check_cache(op, "k_cache", k_cache, page_size)
    checks.check_cache(op, "v_cache", v_cache, page_size)
    checks.require(
        k_cache.shape == v_cache.shape,
        f"{op}: k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} differ",
    )
    checks.require(
        k_cache.dtype == v_cache.dtype,
        f"{op}: k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; make them alike",
    )
    DecodeArguments(
        q,
        page_table,
        seq_lens,
        log_mass,
        mode,
        threshold,
        kappa_floor,
        kappa_std,
        sm_scale,
        sink_pages,
        recent_pages,
        group_pages,
        group_percent,
        first_pages,
        attended,
        kappa_start,
        residuals,
    ).check(op, k_cache.dtype, k_cache.shape[1], k_cache.shape[2])
    return implementation(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        log_mass,
        mode,
        threshold,
        kappa_floor,
        kappa_std,
        page_size=page_size,
        sm_scale=sm_scale,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        group_pages=group_pages,
        group_percent=group_percent,
        first_pages=first_pages,
        attended=attended,
        kappa_start=kappa_start,
        residuals=residuals,
    )


__all__ = [
    "CONSERVATIVE",
    "COVERAGE",
    "DENSE",
    "MARGINAL",
    "NUM_STATS",
    "STAT_NAMES",
    "progressive_decode",
]
