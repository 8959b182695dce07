"""Gated activation in plain torch: the specification."""

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.silu_and_mul.silu_and_mul`; float64 computes in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate, up = x.to(work).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)
