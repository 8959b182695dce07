"""RMS normalisation: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`sgl_psa_kernels.rms_norm.rms_norm`."""
    op = "rms_norm"
    require_cpu(op, x, weight, residual)
    dim = x.shape[-1]
    weight = weight.contiguous()
    rows = x if x.dim() == 2 else x.reshape(-1, dim)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(x.shape)
    total, others = None, rows
    if residual is not None:
        total = x.new_empty(x.shape)
        others = residual if residual.dim() == 2 else residual.reshape(-1, dim)
        others = others if others.stride(1) == 1 else others.contiguous()
    args = abi.RmsNormArgs(
        rows.shape[0],
        dim,
        rows.stride(0),
        others.stride(0),
        dtype_code(op, x),
        torch.get_num_threads(),
        0,
        eps,
        rows.data_ptr(),
        None if total is None else others.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        None if total is None else total.data_ptr(),
    )
    call(op, "psa_rms_norm", args)
    return out, total
