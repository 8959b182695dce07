"""Key sketches: 1, 2 or 4 bits per key element, and page masses estimated from them.

A sketch describes one key vector (token, KV head) by ``k ~ zero + scale * code`` with one affine
pair per key. A page's estimated log mass is the log-sum-exp of its sketched logits, so a sketch
ranks pages almost like the keys themselves at 3-12 % of the bytes of the KV cache. The affine
low-bit form is KIVI's per-token asymmetric quantisation; the 1-bit form keeps mean and mean
absolute deviation.

The rotated form codes ``rotate(k) ~ scale * (code - (2^bits - 1) / 2)`` instead: one number a key
besides the codes, and no error along the key itself (RaBitQ, arXiv 2405.12497). It is scored with a
rotated query.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.key_sketch import cpu, reference, torch_batched, triton_backend
from sgl_psa_kernels.key_sketch.packing import BITS, packed_bytes
from sgl_psa_kernels.key_sketch.prepared import PreparedScore, PreparedWrite
from sgl_psa_kernels.key_sketch.rotation import rotation_matrix, rotation_signs

_WRITE = {
    "reference": reference.write,
    "torch": reference.write,
    "cpu": cpu.write,
    "triton": triton_backend.write,
}
_SCORE = {
    "reference": reference.score,
    "torch": torch_batched.score,
    "cpu": cpu.score,
    "triton": triton_backend.score,
}


def write(
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    signs: torch.Tensor | None = None,
    *,
    bits: int,
    page_size: int,
    backend: str,
    in_order: bool = False,
) -> None:
    """Sketch the keys at ``slots`` and store the sketches in ``codes`` and ``affine``.

    A sketch is a pure function of the stored key (its dtype included). A slot may occur twice.

    Args:
        k_cache: [slots, Hkv, D] bf16 | fp16 | fp32; with ``in_order`` [N, Hkv, D]. Keys beyond
            +-65504 have no finite sketch; their pages score +inf.
        slots: int64 [N], slot numbers within the pool.
        codes: uint8 [num_pages, Hkv, page_size, D * bits // 8], written; the order of the bytes
            of a page and KV head is that of :mod:`sgl_psa_kernels.key_sketch.packing`.
        affine: float16 [num_pages, Hkv, page_size, 2] (scale, zero), written; with ``signs``
            [num_pages, Hkv, page_size, 1] (scale).
        signs: float32 [D], from :func:`rotation_signs`, for rotated sketches.
        bits: 1, 2 or 4 per key element.
        page_size: tokens per page.
        backend: "reference", "torch" (any device), "cpu" (C++) or "triton" (CUDA).
        in_order: row i of ``k_cache`` is the key of ``slots[i]``; then no slot occurs twice.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes, slots outside of the pool.
        RuntimeError: backend "cpu" without a usable native library, "triton" without a CUDA device.
    """
    op = "key_sketch.write"
    implementation = choose(backend, _WRITE, op)
    checks.check_cache(op, "k_cache", k_cache, 1 if in_order else page_size)
    _check_sketch(op, codes, affine, bits, page_size, k_cache.shape[2], 2 if signs is None else 1)
    if signs is not None:
        checks.check_tensor(op, "signs", signs, torch.float32, (k_cache.shape[2],))
    checks.check_tensor(op, "slots", slots, torch.int64, (len(k_cache) if in_order else None,))
    count = len(k_cache) if in_order else codes.shape[0] * page_size
    if codes.shape[1] != k_cache.shape[1] or count != k_cache.shape[0]:
        raise ValueError(
            f"{op}: codes {list(codes.shape)} do not match k_cache {list(k_cache.shape)}"
        )
    implementation(
        k_cache, slots, codes, affine, signs, bits=bits, page_size=page_size, in_order=in_order
    )


def score(
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    candidates: torch.Tensor | None = None,
    log_mass: torch.Tensor | None = None,
    *,
    bits: int,
    page_size: int,
    sm_scale: float,
    backend: str,
) -> torch.Tensor:
    """Estimate the log mass of every page for every query head from the sketches.

    ``log_mass[b, h, j] = log sum_{i in page j} exp(sm_scale * q[b, h] . k~_i)`` over the tokens
    i < seq_len, with k~ the sketched key.

    Args:
        q: [B, Hq, D] bf16 | fp16 | fp32; query head h uses KV head h // (Hq // Hkv). For rotated
            sketches ``q.float() @ rotation_matrix(D)``.
        codes, affine: as written by :func:`write`.
        watermark: int32 [num_pages], tokens of each page that have a sketch.
        page_table: int32 [B, max_pages], physical page of each logical page; entries behind the
            last page of a row are not read.
        seq_lens: int32 [B]; 0 = padding row.
        active: uint8 [B]; rows with 0 are skipped, their result is unspecified.
        candidates: uint8 [B, Hkv, max_pages]; sketches of pages with 0 are not read. Needs
            ``log_mass``.
        log_mass: float32 [B, Hq, max_pages], written in place and returned; pages with
            ``candidates`` 0 keep what is there.
        bits: 1, 2 or 4 per key element.
        page_size: tokens per page.
        sm_scale: softmax scale, usually D ** -0.5.
        backend: "reference", "torch" (any device), "cpu" (C++) or "triton" (CUDA). "cpu" rounds the
            query to 8 bits an element: each is off by at most 1/254 of the head's largest one; or,
            for 1 and 2 bits on CPUs with AVX512-VBMI, every product of a query with four bits of a
            key to 8 bits, which loses no more. That adds less than a tenth to the error of 4-bit
            codes, also where a few elements are large.

    Returns:
        float32 [B, Hq, max_pages]; +inf where the watermark is below the page's tokens or the
        estimate is not a number: such a page must be attended. Columns behind a row's last page
        are unspecified.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes, sequences longer than the page table.
        RuntimeError: backend "cpu" without a usable native library, "triton" without a CUDA device.
    """
    op = "key_sketch.score"
    implementation = choose(backend, _SCORE, op)
    _check_score(
        op,
        q,
        codes,
        affine,
        watermark,
        page_table,
        seq_lens,
        active,
        bits=bits,
        page_size=page_size,
    )
    if candidates is not None:
        shape = (q.shape[0], codes.shape[1], page_table.shape[1])
        checks.check_tensor(op, "candidates", candidates, torch.uint8, shape)
        checks.require(
            log_mass is not None, f"{op}: candidates need log_mass, which holds the other pages"
        )
    if log_mass is not None:
        shape = (q.shape[0], q.shape[1], page_table.shape[1])
        checks.check_tensor(op, "log_mass", log_mass, torch.float32, shape)
    return implementation(
        q,
        codes,
        affine,
        watermark,
        page_table,
        seq_lens,
        active,
        candidates,
        log_mass,
        bits=bits,
        page_size=page_size,
        sm_scale=sm_scale,
    )


def prepare_score(
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    candidates: torch.Tensor | None = None,
    signs: torch.Tensor | None = None,
    *,
    bits: int,
    page_size: int,
) -> PreparedScore:
    """:func:`score` by backend "cpu" with arguments that are checked now, for use in all layers.

    Args:
        codes, affine, watermark: as for :func:`score`, of all layers: [L, ...].
        signs: float32 [D], for rotated sketches and queries that are not rotated.

    Raises:
        ValueError: bad shapes or dtypes.
        RuntimeError: no usable native library.
    """
    op = "key_sketch.score"
    _check_score(
        op,
        q,
        codes[0],
        affine[0],
        watermark[0],
        page_table,
        seq_lens,
        active,
        bits=bits,
        page_size=page_size,
    )
    if candidates is not None:
        shape = (q.shape[0], codes.shape[2], page_table.shape[1])
        checks.check_tensor(op, "candidates", candidates, torch.uint8, shape)
    if signs is not None:
        checks.check_tensor(op, "signs", signs, torch.float32, (q.shape[2],))
    return PreparedScore(
        q,
        codes,
        affine,
        watermark,
        page_table,
        seq_lens,
        active,
        candidates,
        signs,
        bits=bits,
        page_size=page_size,
    )


def _check_score(
    op: str,
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    *,
    bits: int,
    page_size: int,
) -> None:
    _check_sketch(op, codes, affine, bits, page_size, q.shape[-1], affine.shape[-1])
    checks.check_queries(op, q, codes.shape[1], codes.shape[3] * 8 // bits)
    checks.check_rows(op, page_table, seq_lens, q.shape[0])
    checks.check_tensor(op, "watermark", watermark, torch.int32, (codes.shape[0],))
    checks.check_tensor(op, "active", active, torch.uint8, (q.shape[0],))


def _check_sketch(
    op: str,
    codes: torch.Tensor,
    affine: torch.Tensor,
    bits: int,
    page_size: int,
    head_dim: int,
    affine_width: int,
) -> None:
    if bits not in BITS:
        raise ValueError(f"{op}: bits must be one of {BITS}, got {bits}")
    checks.check_page_size(op, page_size)
    width = packed_bytes(head_dim, bits)
    checks.check_tensor(op, "codes", codes, torch.uint8, (None, None, page_size, width))
    pages, heads = codes.shape[:2]
    checks.check_tensor(
        op, "affine", affine, torch.float16, (pages, heads, page_size, affine_width)
    )
    checks.require(affine_width in (1, 2), f"{op}: affine holds 2 numbers a key (rotated: 1)")


__all__ = [
    "BITS",
    "PreparedScore",
    "PreparedWrite",
    "packed_bytes",
    "prepare_score",
    "rotation_matrix",
    "rotation_signs",
    "score",
    "write",
]
