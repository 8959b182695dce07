"""RMS normalisation, of a sum with the residual where there is one (Zhang & Sennrich, 1910.07467).

One pass instead of the six of plain torch, which between them write float32 copies of the rows.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.rms_norm import cpu, reference

_IMPLEMENTATIONS = {"reference": reference.rms_norm, "cpu": cpu.rms_norm}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s / sqrt(mean(s^2) + eps) * weight with s = x + residual, in float32.

    Args:
        x: [..., D] bf16 | fp16 | fp32.
        weight: [D] of the dtype of x.
        residual: [..., D] of the shape and dtype of x, or None for zero.
        eps: added to the mean square.
        backend: "reference" or "cpu" (C++).

    Returns:
        The normalised rows, and s rounded to the dtype of x (None without residual): new tensors.

    Raises:
        ValueError: unknown backend, or shapes and dtypes that do not belong together.
        RuntimeError: backend "cpu" without a usable native library.
    """
    implementation = choose(backend, _IMPLEMENTATIONS, "rms_norm")
    if x.dtype not in checks.KV_DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: x and weight must be of one float dtype, got {x.dtype} and {weight.dtype}"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {list(residual.shape)} {residual.dtype} must be as x "
            f"{list(x.shape)} {x.dtype}"
        )
    return implementation(x, weight, residual, eps)


__all__ = ["rms_norm"]
