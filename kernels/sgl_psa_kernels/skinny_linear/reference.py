"""Linear layer in plain torch: the specification."""

import torch


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.skinny_linear.skinny_linear`; float64 computes in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(work) @ weight.to(work).T
    return (out if bias is None else out + bias.to(work)).to(x.dtype)
