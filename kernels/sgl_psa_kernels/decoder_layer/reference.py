"""A decoder layer in plain torch: the specification."""

from __future__ import annotations

import torch

from sgl_psa_kernels.decoder_layer.parts import Attend, LayerMemory, LayerSettings, LayerWeights
from sgl_psa_kernels.rms_norm.reference import rms_norm
from sgl_psa_kernels.rope.reference import rope
from sgl_psa_kernels.silu_and_mul.reference import silu_and_mul
from sgl_psa_kernels.skinny_linear.reference import skinny_linear


class ReferenceLayer:
    """See :func:`sgl_psa_kernels.decoder_layer.make_layer`. Results are new tensors."""

    def __init__(self, weights: LayerWeights, settings: LayerSettings, memory: LayerMemory) -> None:
        self.weights, self.settings = weights, settings

    def __call__(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        w, s = self.weights, self.settings
        normed, total = rms_norm(hidden, w.norm, residual, s.eps)
        total = hidden if total is None else total
        q, k, v = skinny_linear(normed, w.qkv, w.qkv_bias).split(s.widths, dim=-1)
        rope(positions, q, k, w.cos_sin, s.head_dim, s.interleaved)
        attended = skinny_linear(attend(q, k, v), w.out, w.out_bias)
        normed, after = rms_norm(attended, w.norm_after, total, s.eps_after)
        assert after is not None
        inner = silu_and_mul(skinny_linear(normed, w.gate_up, None))
        return skinny_linear(inner, w.down, None), after
