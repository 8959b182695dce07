"""A linear layer for few rows: a decode step, which is bound by reading the weights.

The weights are read once, in order, as they lie in memory. General matrix products read them
slower unless they are packed first, which needs a second copy of them.
"""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels._native.abi import SKINNY_ROWS as MAX_ROWS
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.skinny_linear import cpu, reference

_IMPLEMENTATIONS = {"reference": reference.skinny_linear, "cpu": cpu.skinny_linear}


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str
) -> torch.Tensor:
    """x @ weight.T + bias, accumulated in float32 and rounded once.

    Args:
        x: [M, K] bf16 | fp16 | fp32 with 1 to ``MAX_ROWS`` rows.
        weight: [N, K] of the dtype of x, rows contiguous.
        bias: [N] of the dtype of x, or None.
        backend: "reference" or "cpu" (C++).

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ValueError: unknown backend, too many rows, or shapes and dtypes that do not belong
            together.
        RuntimeError: backend "cpu" without a usable native library.
    """
    implementation = choose(backend, _IMPLEMENTATIONS, "skinny_linear")
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"skinny_linear: x must be [M, K] with 1 to {MAX_ROWS} rows, got {list(x.shape)}; "
            "use torch.nn.functional.linear for more"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.stride(1) != 1:
        raise ValueError(
            f"skinny_linear: weight must be [N, {x.shape[1]}] with contiguous rows, "
            f"got {list(weight.shape)}"
        )
    if x.dtype not in checks.KV_DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"skinny_linear: x and weight must be of one float dtype, got {x.dtype} and "
            f"{weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"skinny_linear: bias must be [{weight.shape[0]}] {x.dtype}, got {list(bias.shape)} "
            f"{bias.dtype}"
        )
    return implementation(x, weight, bias)


__all__ = ["MAX_ROWS", "skinny_linear"]
