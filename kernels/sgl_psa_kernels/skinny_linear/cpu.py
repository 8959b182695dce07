"""Linear layer for few rows: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.skinny_linear.skinny_linear`."""
    op = "skinny_linear"
    require_cpu(op, x, weight, bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    args = abi.SkinnyLinearArgs(
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        x.stride(0),
        weight.stride(0),
        dtype_code(op, x),
        torch.get_num_threads(),
        0,
        0,
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    call(op, "psa_skinny_linear", args)
    return out
