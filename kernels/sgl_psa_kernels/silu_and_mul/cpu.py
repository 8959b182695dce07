"""Gated activation: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.silu_and_mul.silu_and_mul`."""
    op = "silu_and_mul"
    require_cpu(op, x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    dim = rows.shape[1] // 2
    out = x.new_empty((*x.shape[:-1], dim))
    args = abi.SiluAndMulArgs(
        rows.shape[0],
        dim,
        rows.stride(0),
        dtype_code(op, x),
        torch.get_num_threads(),
        0,
        0,
        rows.data_ptr(),
        out.data_ptr(),
    )
    call(op, "psa_silu_and_mul", args)
    return out
