"""What a decoder layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sgl_psa_kernels import checks

OP = "decoder_layer"

#: (q [M, Hq * D], k, v [M, Hkv * D]) -> attention [M, Hq * D], rows contiguous. The arguments are
#: views of memory that the layer overwrites in its next call.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LayerSettings(NamedTuple):
    """
    Attributes:
        eps, eps_after: of the norms before attention and after it.
        interleaved: the rotary embedding turns neighbouring elements, not the two halves.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    eps_after: float
    interleaved: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """Elements of a token's q, k and v."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_qo_heads * self.head_dim, kv, kv


class LayerWeights(NamedTuple):
    """Tensors of one dtype, [out, in], C the width of the residual stream, I of the MLP.

    Attributes:
        norm, norm_after: [C].
        qkv: [(Hq + 2 Hkv) * D, C], with ``qkv_bias``, or None.
        out: [C, Hq * D], with ``out_bias``, or None.
        gate_up: [2 I, C]; down: [C, I].
        cos_sin: [positions, rotary dimension], as of :func:`sgl_psa_kernels.rope.rope`.
    """

    norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm_after: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    cos_sin: torch.Tensor

    def check(self, settings: LayerSettings) -> None:
        """
        Raises:
            ValueError: shapes, dtypes or strides that do not belong together.
        """
        width, inner = self.norm.shape[0], self.down.shape[1]
        q, k, v = settings.widths
        shapes = {
            "norm": [width],
            "qkv": [q + k + v, width],
            "qkv_bias": [q + k + v],
            "out": [width, q],
            "out_bias": [width],
            "norm_after": [width],
            "gate_up": [2 * inner, width],
            "down": [width, inner],
            "cos_sin": [self.cos_sin.shape[0], self.cos_sin.shape[-1]],
        }
        for name, tensor in self._asdict().items():
            if tensor is not None:
                checks.require(
                    list(tensor.shape) == shapes[name]
                    and tensor.dtype == self.norm.dtype
                    and tensor.is_contiguous(),
                    f"{OP}: {name} must be {shapes[name]} {self.norm.dtype}, contiguous, got "
                    f"{list(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}",
                )


class LayerSizes(NamedTuple):
    """What the memory of a layer follows from.

    Attributes:
        width: C; inner: I; widths: elements of a token's q, k and v.
    """

    rows: int
    width: int
    inner: int
    widths: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, weights: LayerWeights, settings: LayerSettings, rows: int) -> LayerSizes:
        """Those of a layer for ``rows`` tokens."""
        norm, down = weights.norm, weights.down
        return cls(rows, norm.shape[0], down.shape[1], settings.widths, norm.dtype)


class LayerMemory:
    """Memory that the layers of a model share, one of which is called after the other."""

    def __init__(self, sizes: LayerSizes) -> None:
        self.sizes = sizes
        width, inner, qkv = sizes.width, sizes.inner, sum(sizes.widths)

        def rows_of(columns: int) -> torch.Tensor:
            return torch.empty(sizes.rows, columns, dtype=sizes.dtype)

        self.normed, self.total, self.projected = rows_of(width), rows_of(width), rows_of(width)
        self.hidden, self.residual = rows_of(width), rows_of(width)
        self.qkv, self.gate_up, self.inner = rows_of(qkv), rows_of(2 * inner), rows_of(inner)
        self.q, self.k, self.v = self.qkv.split(sizes.widths, dim=-1)
