"""Dense prefill attention of one request's chunk, by device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from sgl_psa_kernels import prefill_attention
from torch.nn.attention.bias import causal_lower_right

from sgl_psa.config import PSAConfig

#: (q [S, Hq, D], k_prefix, v_prefix [Lp, Hkv, D] | None, k, v [S, Hkv, D], sm_scale) -> [S, Hq, D]
Prefill = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, float],
    torch.Tensor,
]


def choose(config: PSAConfig, device: torch.device | str) -> Prefill:
    """The function for ``device``: two exact parts on CPU, torch's fused attention elsewhere."""
    if torch.device(device).type != "cpu":
        return fused
    backend = "reference" if config.backend == "reference" else "cpu"
    return functools.partial(two_parts, backend=backend)


def two_parts(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    *,
    backend: str,
) -> torch.Tensor:
    """Prefix and causal chunk apart, merged by log-sum-exp."""
    out, _ = prefill_attention.prefill(
        q, k_prefix, v_prefix, k, v, sm_scale=sm_scale, backend=backend
    )
    return out


def fused(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """One call of torch's scaled dot product attention, causal from the lower right corner."""
    if k_prefix is not None and v_prefix is not None:
        k, v = torch.cat([k_prefix, k]), torch.cat([v_prefix, v])
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=causal_lower_right(q.shape[2], k.shape[2]),
        scale=sm_scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)
