"""A decoder layer as a sequence of prepared calls of the C++ kernels."""

from __future__ import annotations

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, dtype_code, require_cpu
from sgl_psa_kernels.decoder_layer.parts import (
    OP,
    Attend,
    LayerMemory,
    LayerSettings,
    LayerWeights,
)


class NativeLayer:
    """See :func:`sgl_psa_kernels.decoder_layer.make_layer`. Results lie in the layer's memory."""

    def __init__(self, weights: LayerWeights, settings: LayerSettings, memory: LayerMemory) -> None:
        require_cpu(OP, *weights)
        rows = memory.sizes.rows
        checks.require(
            1 <= rows <= abi.SKINNY_ROWS, f"{OP}: rows must be 1 to {abi.SKINNY_ROWS}, got {rows}"
        )
        w, s, m = weights, settings, memory
        self._weights, self._memory = weights, memory
        self._norm = self._norm_call(m.hidden, w.norm, m.total, s.eps)
        self._norm_after = self._norm_call(m.projected, w.norm_after, m.residual, s.eps_after)
        self._to_qkv = self._linear_call(m.normed, w.qkv, w.qkv_bias, m.qkv)
        self._to_out = self._linear_call(m.q, w.out, w.out_bias, m.projected)
        self._to_gate_up = self._linear_call(m.normed, w.gate_up, None, m.gate_up)
        self._to_hidden = self._linear_call(m.inner, w.down, None, m.hidden)
        self._rope = self._rope_call(w.cos_sin, s)
        self._activation = self._activation_call()

    def __call__(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm, after = self._norm.args, self._norm_after.args
        norm.x = hidden.data_ptr()
        if residual is None:
            norm.residual = norm.residual_out = None
            after.residual = norm.x
        else:
            norm.residual = residual.data_ptr()
            norm.residual_out = after.residual = self._memory.total.data_ptr()
        self._rope.args.positions = positions.data_ptr()
        self._norm()
        self._to_qkv()
        self._rope()
        attended = attend(self._memory.q, self._memory.k, self._memory.v)
        self._to_out.args.x = attended.data_ptr()
        self._to_out()
        self._norm_after()
        self._to_gate_up()
        self._activation()
        self._to_hidden()
        return self._memory.hidden, self._memory.residual

    def _norm_call(
        self, x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, eps: float
    ) -> PreparedCall:
        rows, dim = x.shape
        args = abi.RmsNormArgs(
            rows, dim, dim, dim, dtype_code(OP, x), 1, 0, eps,
            x.data_ptr(), None, weight.data_ptr(), self._memory.normed.data_ptr(), total.data_ptr(),
        )  # fmt: skip
        return PreparedCall(OP, "psa_rms_norm", args)

    def _linear_call(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> PreparedCall:
        columns, inputs = weight.shape
        args = abi.SkinnyLinearArgs(
            len(x), inputs, columns, inputs, inputs, dtype_code(OP, x), 1, 0, 0,
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return PreparedCall(OP, "psa_skinny_linear", args)

    def _rope_call(self, cos_sin: torch.Tensor, s: LayerSettings) -> PreparedCall:
        q, k = self._memory.q, self._memory.k
        args = abi.RopeArgs(
            len(q), len(cos_sin), q.stride(0), k.stride(0), s.num_qo_heads, s.num_kv_heads,
            s.head_dim, cos_sin.shape[1], dtype_code(OP, q), s.interleaved, 1, 0,
            None, cos_sin.data_ptr(), q.data_ptr(), k.data_ptr(),
        )  # fmt: skip
        return PreparedCall(OP, "psa_rope", args)

    def _activation_call(self) -> PreparedCall:
        gate_up, inner = self._memory.gate_up, self._memory.inner
        args = abi.SiluAndMulArgs(
            *inner.shape, gate_up.shape[1], dtype_code(OP, inner), 1, 0, 0,
            gate_up.data_ptr(), inner.data_ptr(),
        )  # fmt: skip
        return PreparedCall(OP, "psa_silu_and_mul", args)
