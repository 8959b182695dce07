"""Rotary position embedding: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu


def rope(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    head_dim: int,
    interleaved: bool,
) -> None:
    """See :func:`sgl_psa_kernels.rope.rope`."""
    op = "rope"
    require_cpu(op, positions, q, k, cos_sin)
    positions, cos_sin = positions.contiguous(), cos_sin.contiguous()
    args = abi.RopeArgs(
        positions.shape[0],
        cos_sin.shape[0],
        q.stride(0),
        k.stride(0),
        q.shape[1] // head_dim,
        k.shape[1] // head_dim,
        head_dim,
        cos_sin.shape[1],
        dtype_code(op, q),
        interleaved,
        torch.get_num_threads(),
        0,
        positions.data_ptr(),
        cos_sin.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
    )
    call(op, "psa_rope", args)
