"""RMS normalisation in plain torch: the specification."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`sgl_psa_kernels.rms_norm.rms_norm`; float64 computes in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(work) if residual is None else x.to(work) + residual.to(work)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    out = (total * scale * weight.to(work)).to(x.dtype)
    return out, None if residual is None else total.to(x.dtype)
