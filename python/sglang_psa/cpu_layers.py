"""Faster layers around attention on the CPU platform, for a server that decodes with psa.

SGLang's own CPU kernels need AMX; without it a step goes through plain torch, which reads the
weights at half the speed of memory, multiplies 16-bit matrices slower than float32 ones and makes
a dozen operations of a norm or a rotation. What is
replaced is an attribute of each layer object, after the weights are loaded: the classes stay, and
so does every layer that is not exactly of a kind listed here. Weights are read where they lie, so
whatever updates them in place is seen at once.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from sgl_psa_kernels.prefill_attention import faster_in_torch
from sgl_psa_kernels.rms_norm import rms_norm
from sgl_psa_kernels.rope import rope
from sgl_psa_kernels.silu_and_mul import silu_and_mul
from sgl_psa_kernels.skinny_linear import MAX_ROWS, skinny_linear
from sgl_psa_kernels.wide_products import MIN_ROWS, faster_in_float32

from sglang_psa.compat import (
    LogitsProcessor,
    RMSNorm,
    RotaryEmbedding,
    SiluAndMul,
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang_psa.hooks import HookNotApplied

logger = logging.getLogger(__name__)

#: Types whose matrix products torch does not already run at the speed of the machine.
SHORT_TYPES = (torch.bfloat16, torch.float16)
#: Types of activations that the kernels take.
KERNEL_TYPES = (*SHORT_TYPES, torch.float32)
#: Calls since start by what ran: the names of kernels, ``wide_linear``, or ``torch`` for input that
#: none of them takes.
calls: Counter[str] = Counter()
#: Elements of a weight that are converted to float32 at a time.
_PART = 1 << 22


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear``, by the kernel for few rows and in float32 for many where these are faster."""
    rows = x.shape[0]
    if (
        x.dim() == 2
        and x.dtype in SHORT_TYPES
        and weight.dtype == x.dtype
        and type(weight) is torch.nn.Parameter  # no quantised subclass
        and weight.stride(1) == 1
    ):
        if 0 < rows <= MAX_ROWS:
            calls["skinny_linear"] += 1
            return skinny_linear(x, weight, bias, backend="cpu")
        if rows >= MIN_ROWS and faster_in_float32(x.dtype):
            calls["wide_linear"] += 1
            return wide_linear(x, weight, bias)
    calls["torch"] += 1
    return torch.nn.functional.linear(x, weight, bias)


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` of 16-bit tensors with float32 products, rounded once."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    wide, start = x.float(), 0
    for part in weight.split(max(1, _PART // weight.shape[1])):
        stop = start + part.shape[0]
        offset = None if bias is None else bias[start:stop].float()
        out[:, start:stop] = torch.nn.functional.linear(wide, part.float(), offset)
        start = stop
    return out


class CpuLinearMethod(UnquantizedLinearMethod):
    """Linear layers without quantisation."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[M, K] or [..., K] times the layer's weight [N, K]."""
        return linear(x, layer.weight, bias)


class CpuHeadMethod(UnquantizedEmbeddingMethod):
    """Embeddings and the output head, which may be one module."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [M, vocab]; without ``bias``, as SGLang's plain path."""
        return linear(x.to(layer.weight.dtype), layer.weight, None)


def norm(
    module: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``RMSNorm.forward_native`` in one pass."""
    same = x.dtype == module.weight.dtype and (residual is None or residual.dtype == x.dtype)
    if not same or post_residual_addition is not None:
        calls["torch"] += 1
        return module.forward_native(x, residual, post_residual_addition)
    calls["rms_norm"] += 1
    out, total = rms_norm(
        x, module.weight.data, residual, eps=module.variance_epsilon, backend="cpu"
    )
    return out if total is None else (out, total)


def rotate(
    module: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RotaryEmbedding.forward_native`` in one pass and in place, as SGLang does on CUDA."""
    table = module.cos_sin_cache
    if (
        offsets is not None
        or fused_set_kv_buffer_arg is not None
        or hasattr(module, "sin_cos_cache")
        or not query.dim() == key.dim() == 2
        or not query.stride(1) == key.stride(1) == 1
        or not query.dtype == key.dtype == table.dtype
        or positions.dim() != 1
        or positions.dtype != torch.int64
    ):
        calls["torch"] += 1
        return module.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    calls["rope"] += 1
    rope(
        positions,
        query,
        key,
        table,
        head_dim=module.head_size,
        interleaved=not module.is_neox_style,
        backend="cpu",
    )
    return query, key


def activate(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul.forward_native`` in one pass."""
    calls["silu_and_mul"] += 1
    return silu_and_mul(x, backend="cpu")


def plain_norm(module: Any) -> bool:
    """Whether :func:`norm` computes all that the module does."""
    return (
        type(module) is RMSNorm
        and module.has_weight
        and not module.cast_x_before_out_mul
        and not module.fp32_residual
        and module.variance_size_override is None
        and module.override_orig_dtype is None
    )


def plain_rope(module: Any) -> bool:
    """Whether :func:`rotate` computes all that the module does."""
    return (
        isinstance(module, RotaryEmbedding)
        and type(module).forward_native is RotaryEmbedding.forward_native
    )


def plain_logits(model: Any) -> bool:
    """Whether nothing is rounded in another way than usual, as training wants it."""
    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    return not any(p.use_fp32_lm_head or p.rl_on_policy_target is not None for p in processors)


def plain_linear(module: Any) -> bool:
    """Whether :func:`linear` computes all that a layer, once installed, does."""
    return (
        type(module.quant_method) is CpuLinearMethod
        and type(module.weight) is torch.nn.Parameter
        and module.weight.dtype in SHORT_TYPES
    )


def install(model: Any) -> dict[str, int]:
    """Let the layers of a loaded model use the kernels.

    Returns:
        How many layers of each kind do.

    Raises:
        HookNotApplied: SGLang's layers do not choose their implementation as they did.
    """
    counts = dict.fromkeys(("linear", "head", "norm", "rope", "activation"), 0)
    logits = plain_logits(model)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(method) is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
            counts["linear"] += 1
        elif type(method) is UnquantizedEmbeddingMethod and logits:
            module.quant_method = CpuHeadMethod()
            counts["head"] += 1
        elif plain_norm(module):
            _replace_forward(module, norm)
            counts["norm"] += 1
        elif plain_rope(module):
            _replace_forward(module, rotate)
            counts["rope"] += 1
        elif type(module) is SiluAndMul:
            _replace_forward(module, activate)
            counts["activation"] += 1
    for dtype in {parameter.dtype for parameter in model.parameters()}.intersection(KERNEL_TYPES):
        # Measured now, not by the first request.
        faster_in_float32(dtype)
        faster_in_torch(dtype)
    logger.info("psa CPU layers: %s", ", ".join(f"{n} {name}" for name, n in counts.items()))
    return counts


def _replace_forward(module: Any, forward: Any) -> None:
    """Make ``forward`` what ``module`` runs in place of its native torch implementation."""
    if getattr(module, "_forward_method", None) != module.forward_native:
        raise HookNotApplied(
            f"{type(module).__name__} does not run its forward_native, as SGLang does on CPU; "
            "install the SGLang version of the README, or use --psa-backend torch"
        )
    module._forward_method = forward.__get__(module)
