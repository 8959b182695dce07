"""Gated activation of an MLP: SiLU of one half of a row times the other (SwiGLU, 2002.05202).

One pass instead of the two of plain torch, which writes and rounds SiLU in between.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.silu_and_mul import cpu, reference

_IMPLEMENTATIONS = {"reference": reference.silu_and_mul, "cpu": cpu.silu_and_mul}


def silu_and_mul(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    """g / (1 + exp(-g)) * u of rows [g, u], in float32, rounded once.

    Args:
        x: [..., 2 * D] bf16 | fp16 | fp32.
        backend: "reference" or "cpu" (C++).

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: unknown backend, an odd number of columns, or another dtype.
        RuntimeError: backend "cpu" without a usable native library.
    """
    implementation = choose(backend, _IMPLEMENTATIONS, "silu_and_mul")
    if x.dtype not in checks.KV_DTYPES:
        raise ValueError(f"silu_and_mul: x must be of a float dtype, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: x must be [..., 2 * D], got {list(x.shape)}")
    return implementation(x)


__all__ = ["silu_and_mul"]
