"""Rotary position embedding of queries and keys, in place (Su et al., 2104.09864)."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.rope import cpu, reference

_IMPLEMENTATIONS = {"reference": reference.rope, "cpu": cpu.rope}


def rope(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    head_dim: int,
    interleaved: bool,
    backend: str,
) -> None:
    """Rotate the first R elements of every head of q and k by the angles of their positions.

    Products are rounded to the dtype before they are added, as plain torch operations do.

    Args:
        positions: int64 [T].
        q, k: [T, heads * head_dim] bf16 | fp16 | fp32, rows contiguous; overwritten.
        cos_sin: [max_positions, R] of the dtype of q: R / 2 cosines, then R / 2 sines.
        head_dim: elements of a head, at least R; those behind R stay.
        interleaved: element 2i pairs with 2i + 1 (GPT-J); otherwise i with i + R / 2 (NeoX).
        backend: "reference" or "cpu" (C++).

    Raises:
        ValueError: unknown backend, a position outside of ``cos_sin``, or shapes and dtypes that
            do not belong together.
        RuntimeError: backend "cpu" without a usable native library.
    """
    implementation = choose(backend, _IMPLEMENTATIONS, "rope")
    if positions.dim() != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"rope: positions must be int64 [T], got {list(positions.shape)} {positions.dtype}"
        )
    dim = cos_sin.shape[-1]
    if cos_sin.dim() != 2 or dim % 2 or dim > head_dim or cos_sin.stride(1) != 1:
        raise ValueError(
            f"rope: cos_sin must be [max_positions, R], R even and at most head_dim {head_dim}, "
            f"rows contiguous; got {list(cos_sin.shape)}"
        )
    for x in (q, k):
        if x.dim() != 2 or x.shape[0] != positions.shape[0] or x.shape[1] % head_dim:
            raise ValueError(
                f"rope: q and k must be [{positions.shape[0]}, heads * {head_dim}], "
                f"got {list(x.shape)}"
            )
        if x.stride(1) != 1 or x.dtype != cos_sin.dtype or x.dtype not in checks.KV_DTYPES:
            raise ValueError(
                "rope: q, k and cos_sin must have one float dtype and contiguous rows; "
                f"got {x.dtype} and {cos_sin.dtype}"
            )
    implementation(positions, q, k, cos_sin, head_dim, interleaved)


__all__ = ["rope"]
