"""Tail compensation: pages that were left out count by the mean of their values.

Sparse attention drops the mass of the pages that it leaves out. With an estimate L_b of the log
mass of each and the mean v_b of its values, the output becomes

    o' = (Z_P o_P + sum_b e^{L_b} v_b) / (Z_P + sum_b e^{L_b}),  b over the pages left out,

where o_P and log Z_P are output and log-sum-exp over the pages attended. Exact if the estimates
are and all values of a page are equal. Source of the idea: RetroInfer (arXiv 2505.02922), which
estimates the attention of clusters that it does not read from their centroids.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.tail_compensation import reference, torch_batched, triton_backend

_IMPLEMENTATIONS = {
    "reference": reference.compensate,
    "torch": torch_batched.compensate,
    "triton": triton_backend.compensate,
}


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
    backend: str,
) -> torch.Tensor:
    """Add the pages left out to an output of :func:`progressive_decode`.

    Where nothing was left out the result is ``out`` bit for bit.

    Args:
        out: [B, Hq, D] bf16 | fp16 | fp32, over the pages attended; query head h uses KV head
            h // (Hq // Hkv).
        lse: float32 [B, Hq], natural log, of the pages attended.
        log_mass: float32 [B, Hq, max_pages], estimated log mass of every page; read of pages left
            out only, where it must be below +inf (-inf: no mass).
        attended: uint8 [B, Hkv, max_pages], as written by ``progressive_decode``.
        value_means: bfloat16 [num_pages, Hkv, D], mean of the values of each physical page; read
            of pages left out only.
        page_table: int32 [B, max_pages], physical page of each logical page; entries behind the
            last page of a row are not read.
        seq_lens: int32 [B]; 0 = padding row.
        active: uint8 [B]; rows with 0 keep ``out``.
        page_size: tokens per page.
        backend: "reference", "torch" (any device) or "triton" (CUDA). There is no C++ kernel.

    Returns:
        [B, Hq, D] in the dtype of ``out``; ``out`` itself is not changed.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes.
        RuntimeError: backend "triton" without a CUDA device.
    """
    op = "tail_compensation"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.check_page_size(op, page_size)
    checks.check_tensor(op, "value_means", value_means, torch.bfloat16, (None, None, None))
    _, heads, dim = value_means.shape
    checks.check_queries(op, out, heads, dim)
    batch, query_heads, _ = out.shape
    checks.check_rows(op, page_table, seq_lens, batch)
    pages = page_table.shape[1]
    checks.check_tensor(op, "lse", lse, torch.float32, (batch, query_heads))
    checks.check_tensor(op, "log_mass", log_mass, torch.float32, (batch, query_heads, pages))
    checks.check_tensor(op, "attended", attended, torch.uint8, (batch, heads, pages))
    checks.check_tensor(op, "active", active, torch.uint8, (batch,))
    return implementation(
        out,
        lse,
        log_mass,
        attended,
        value_means,
        page_table,
        seq_lens,
        active,
        page_size=page_size,
    )


__all__ = ["compensate"]
