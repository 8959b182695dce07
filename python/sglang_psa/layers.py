"""Which attention layers psa can run; a model with any other is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_psa.compat import AttentionType, RadixAttention


class UnsupportedLayer(RuntimeError):
    """An attention layer that psa would compute wrongly."""


#: What is not supported -> whether a layer has it.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "a sliding window": lambda layer: layer.sliding_window_size != -1,
    "logit soft-capping": lambda layer: bool(layer.logit_cap),
    "value heads of another size than key heads": lambda layer: layer.v_head_dim != layer.head_dim,
    "cross attention": lambda layer: layer.is_cross_attention,
    "bidirectional attention": lambda layer: layer.attn_type != AttentionType.DECODER,
    "position encoding inside attention": lambda layer: layer.pos_encoding_mode != "NONE",
    "interleaved chunked attention (iRoPE)": lambda layer: bool(layer.use_irope),
    "a temperature by position": lambda layer: layer.xai_temperature_len > 0,
    "query heads that do not share KV heads evenly": (
        lambda layer: layer.tp_q_head_num % layer.tp_k_head_num != 0
    ),
}


def check(model: Any) -> None:
    """Check every attention layer of a loaded model.

    Raises:
        UnsupportedLayer: naming the layers, what they have, and the way out.
    """
    found: dict[str, list[int]] = {}
    for module in model.modules():
        if isinstance(module, RadixAttention):
            for what, has in UNSUPPORTED.items():
                if has(module):
                    found.setdefault(what, []).append(module.layer_id)
    if found:
        listed = "; ".join(f"{what} in layers {ids}" for what, ids in found.items())
        raise UnsupportedLayer(
            f"the psa backend cannot run this model: {listed}. Serve it without "
            "--attention-backend psa"
        )


def query_heads(model: Any) -> int:
    """Query heads of an attention layer of a loaded model, on this tensor-parallel rank."""
    heads = {m.tp_q_head_num for m in model.modules() if isinstance(m, RadixAttention)}
    return int(max(heads))
