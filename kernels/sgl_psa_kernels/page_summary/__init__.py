"""Page summaries: a few vectors per (page, KV head), and page masses estimated from them.

Five kinds share the operator: mean, gaussian (mean and variance), cuboid_mean (box centre and mean
distance from it), box (an upper bound) and hybrid (gaussian for ordinary pages, cuboid mean for
pages with a spike). Each stores only what it needs; see :mod:`~sgl_psa_kernels.page_summary.kinds`,
and :mod:`~sgl_psa_kernels.page_summary.storage` for how: in bfloat16, or in 8 bits an element.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.page_summary import cpu, reference, torch_batched, triton_backend
from sgl_psa_kernels.page_summary.kinds import VECTORS

_UPDATE = {
    "reference": reference.update,
    "torch": torch_batched.update,
    "cpu": cpu.update,
    "triton": triton_backend.update,
}
_SCORE = {
    "reference": reference.score,
    "torch": torch_batched.score,
    "cpu": cpu.score,
    "triton": triton_backend.score,
}


def update(
    k_cache: torch.Tensor,
    pages: torch.Tensor,
    fill: torch.Tensor,
    summary: torch.Tensor,
    *,
    kind: str,
    page_size: int,
    backend: str,
    affine: torch.Tensor | None = None,
) -> None:
    """Recompute the summary of each page from its first ``fill`` tokens.

    A summary is a pure function of those keys. A page may occur twice with the same fill.

    Args:
        k_cache: [slots, Hkv, D] bf16 | fp16 | fp32. Slots of a page behind its fill are not read.
        pages: int64 [M], physical pages.
        fill: int32 [M], 1 .. page_size tokens.
        summary: [num_pages, Hkv, VECTORS[kind], D], written: bfloat16, or codes uint8 with
            ``affine``. A box is rounded outward.
        kind: a key of ``VECTORS``.
        page_size: tokens per page.
        backend: "reference", "torch" (any device), "cpu" (C++) or "triton" (CUDA).
        affine: ``None``, or bfloat16 [num_pages, Hkv, VECTORS[kind], 2], written: scale and zero of
            each vector of codes.

    Raises:
        ValueError: unknown backend or kind, bad shapes or dtypes, pages outside of the pool, fill
            not in 1 .. page_size.
        RuntimeError: backend "cpu" without a usable native library, "triton" without a CUDA device.
    """
    op = "page_summary.update"
    implementation = choose(backend, _UPDATE, op)
    checks.check_cache(op, "k_cache", k_cache, page_size)
    slots, heads, dim = k_cache.shape
    _check_summary(op, kind, summary, affine, (slots // page_size, heads, dim))
    checks.check_tensor(op, "pages", pages, torch.int64, (None,))
    checks.check_tensor(op, "fill", fill, torch.int32, (pages.shape[0],))
    implementation(k_cache, pages, fill, summary, affine=affine, kind=kind, page_size=page_size)


def score(
    q: torch.Tensor,
    summary: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    kind: str,
    page_size: int,
    sm_scale: float,
    backend: str,
    affine: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate the log mass of every page for every query head from the summaries.

    The estimate of each kind, for x = sm_scale * q[b, h], is in
    :mod:`~sgl_psa_kernels.page_summary.kinds`.

    Args:
        q: [B, Hq, D] bf16 | fp16 | fp32; query head h uses KV head h // (Hq // Hkv).
        summary: as written by :func:`update` for this ``kind``, with or without ``affine``.
        watermark: int32 [num_pages], tokens of each page that its summary describes.
        page_table: int32 [B, max_pages], physical page of each logical page; entries behind the
            last page of a row are not read.
        seq_lens: int32 [B]; 0 = padding row.
        active: uint8 [B]; rows with 0 are skipped, their result is unspecified.
        kind: a key of ``VECTORS``.
        page_size: tokens per page.
        sm_scale: softmax scale, usually D ** -0.5.
        backend: "reference", "torch" (any device), "cpu" (C++) or "triton" (CUDA).
        affine: as written by :func:`update`, or ``None``.

    Returns:
        float32 [B, Hq, max_pages]; +inf where the watermark is below the page's tokens or the
        estimate is not a number: such a page must be attended. Columns behind a row's last page
        are unspecified.

    Raises:
        ValueError: unknown backend or kind, bad shapes or dtypes, sequences longer than the page
            table.
        RuntimeError: backend "cpu" without a usable native library, "triton" without a CUDA device.
    """
    op = "page_summary.score"
    implementation = choose(backend, _SCORE, op)
    checks.check_page_size(op, page_size)
    _check_summary(op, kind, summary, affine, (None, None, None))
    checks.check_queries(op, q, summary.shape[1], summary.shape[3])
    checks.check_rows(op, page_table, seq_lens, q.shape[0])
    checks.check_tensor(op, "watermark", watermark, torch.int32, (summary.shape[0],))
    checks.check_tensor(op, "active", active, torch.uint8, (q.shape[0],))
    return implementation(
        q,
        summary,
        watermark,
        page_table,
        seq_lens,
        active,
        affine=affine,
        kind=kind,
        page_size=page_size,
        sm_scale=sm_scale,
    )


def _check_summary(
    op: str,
    kind: str,
    summary: torch.Tensor,
    affine: torch.Tensor | None,
    shape: tuple[int | None, int | None, int | None],
) -> None:
    """``shape``: pages, KV heads and head dimension, where they are known."""
    choices = ", ".join(VECTORS)
    checks.require(kind in VECTORS, f"{op}: unknown kind {kind!r}; choose one of {choices}")
    checks.require(
        affine is not None or summary.dtype != torch.uint8,
        f"{op}: a summary of 8-bit codes needs affine; pass the one it was written with",
    )
    pages, heads, dim = shape
    dtype = torch.bfloat16 if affine is None else torch.uint8
    checks.check_tensor(op, "summary", summary, dtype, (pages, heads, VECTORS[kind], dim))
    if affine is not None:
        checks.check_tensor(op, "affine", affine, torch.bfloat16, (*summary.shape[:3], 2))


__all__ = ["VECTORS", "score", "update"]
