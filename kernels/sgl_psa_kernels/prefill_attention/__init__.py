"""Prefill attention of one request in two parts: cached prefix and causal chunk.

The parts are merged by log-sum-exp, so the cost is that of the scores which exist: no padded query
of the total length and no copies of keys and values per query head.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.prefill_attention import blocks, cpu, reference, torch_flash
from sgl_psa_kernels.prefill_attention.blocks import BLOCK_TOKENS, Blocks
from sgl_psa_kernels.prefill_attention.cpu import faster_in_torch

_IMPLEMENTATIONS = {
    "reference": reference.prefill,
    "torch": torch_flash.prefill,
    "cpu": cpu.prefill,
}


def prefill(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of S new tokens over a prefix (all of it) and over themselves (causal).

    Args:
        q: [S, Hq, D] bf16 | fp16 | fp32; query head h uses KV head h // (Hq // Hkv).
        k_prefix, v_prefix: [Lp, Hkv, D] of the dtype of q, or both None when there is no prefix.
        k_chunk, v_chunk: [S, Hkv, D], keys and values of the new tokens.
        sm_scale: softmax scale, usually D ** -0.5.
        backend: "reference" (plain softmax), "torch" (its flash attention for CPUs) or "cpu" (C++,
            or torch's where that is faster).

    Returns:
        out [S, Hq, D] in the dtype of q and lse float32 [S, Hq] (natural log).

    Raises:
        ValueError: unknown backend, or shapes and dtypes that do not belong together.
    """
    op = "prefill_attention"
    checks.require(
        (k_prefix is None) == (v_prefix is None),
        f"{op}: pass both k_prefix and v_prefix, or neither",
    )
    prefix: Blocks = ()
    if k_prefix is not None and v_prefix is not None and len(k_prefix):
        checks.require(
            k_prefix.shape == v_prefix.shape and k_prefix.shape[1:] == k_chunk.shape[1:],
            f"{op}: k_prefix {list(k_prefix.shape)}, v_prefix {list(v_prefix.shape)} and k_chunk "
            f"{list(k_chunk.shape)} do not belong together",
        )
        prefix = blocks.split(k_prefix, v_prefix, BLOCK_TOKENS)
    return prefill_blocks(q, prefix, k_chunk, v_chunk, sm_scale=sm_scale, backend=backend)


def prefill_blocks(
    q: torch.Tensor,
    prefix: Blocks,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`prefill` over a prefix that does not lie in one piece; the results are the same, bit
    for bit.

    Args:
        prefix: keys and values of ``BLOCK_TOKENS`` tokens each, in order, the last block may be
            shorter: [block, Hkv, D] of the dtype of q. A block is not looked at any more when the
            next one is taken, so all may come through one buffer.
        q, k_chunk, v_chunk, sm_scale, backend: as in ``prefill``.

    Raises:
        ValueError: as ``prefill``, or blocks of other sizes.
    """
    op = "prefill_attention"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.require(k_chunk.dim() == 3, f"{op}: k_chunk must be [S, Hkv, D]")
    checks.check_queries(op, q, k_chunk.shape[1], k_chunk.shape[2])
    checks.require(
        k_chunk.shape == v_chunk.shape and k_chunk.shape[0] == q.shape[0],
        f"{op}: q {list(q.shape)}, k_chunk {list(k_chunk.shape)} and v_chunk "
        f"{list(v_chunk.shape)} do not belong together",
    )
    checks.require(
        k_chunk.dtype == v_chunk.dtype == q.dtype,
        f"{op}: q, keys and values must have one dtype; q is {q.dtype}",
    )
    prefix = blocks.checked(prefix, k_chunk, BLOCK_TOKENS)
    return implementation(q, prefix, k_chunk, v_chunk, sm_scale=sm_scale)


__all__ = ["BLOCK_TOKENS", "faster_in_torch", "prefill", "prefill_blocks"]
