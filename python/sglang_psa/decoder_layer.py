"""Decoder layers of Llama's kind in decode steps on the CPU platform, without SGLang's way there.

A layer of a decode step is a dozen short kernels; on a CPU the modules, checks and dispatchers
between them take as long as all of them but the matrix products. What is replaced is ``forward`` of
each layer object whose parts are all of a known kind; prefill, larger batches and every other layer
go SGLang's way, which computes the same bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from sgl_psa_kernels.decoder_layer import (
    MAX_ROWS,
    Layer,
    LayerMemory,
    LayerSettings,
    LayerSizes,
    LayerWeights,
    make_layer,
)

from sglang_psa import cpu_layers
from sglang_psa.compat import LlamaDecoderLayer, Qwen2DecoderLayer, SiluAndMul

logger = logging.getLogger(__name__)

#: Classes whose ``forward`` is that of :mod:`sgl_psa_kernels.decoder_layer`. They are compared
#: exactly: a subclass may compute something else.
KINDS: tuple[type, ...] = (LlamaDecoderLayer, Qwen2DecoderLayer)

#: What a layer calls in a decode step, by kernel.
KERNELS = {"rms_norm": 2, "skinny_linear": 4, "rope": 1, "silu_and_mul": 1}

Memories = dict[LayerSizes, LayerMemory]


def install(model: Any) -> int:
    """Let layers of a loaded model, whose parts use the kernels by now, be called as one.

    Returns:
        How many layers are.
    """
    if not cpu_layers.plain_logits(model):
        return 0
    memories: Memories = {}
    count = 0
    for module in model.modules():
        if type(module) in KINDS and _is_plain(module):
            module.forward = DecodeForward(module, memories)
            count += 1
    logger.info("psa decoder layers: %d are called as one in decode steps", count)
    return count


def calls() -> Counter[str]:
    """:data:`cpu_layers.calls` with the kernels inside of decoder layers."""
    counted = cpu_layers.calls.copy()
    for name, times in KERNELS.items():
        if inside := times * counted["decoder_layer"]:
            counted[name] += inside
    return counted


class DecodeForward:
    """``forward`` of a layer."""

    def __init__(self, layer: Any, memories: Memories) -> None:
        """
        Args:
            memories: of all layers of a model, which share them.
        """
        self._layer, self._memories = layer, memories
        self._otherwise = layer.forward
        self._dtype = layer.self_attn.qkv_proj.weight.dtype
        self._sources = list(_sources(layer))
        self._pointers: list[int] = []
        self._made: dict[int, Layer] = {}
        self._watched: bool | None = None

    def __call__(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: Any,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's own ``forward``. The result is overwritten by the model's next step."""
        rows = hidden_states.shape[0]
        if (
            not 0 < rows <= MAX_ROWS
            or not forward_batch.forward_mode.is_decode()
            or positions.shape != (rows,)
            or positions.dtype != torch.int64
            or not positions.is_contiguous()
            or hidden_states.dtype != self._dtype
            or not hidden_states.is_contiguous()
            or self._is_watched()
        ):
            result: tuple[torch.Tensor, torch.Tensor] = self._otherwise(
                positions, hidden_states, forward_batch, residual
            )
            return result
        cpu_layers.calls["decoder_layer"] += 1
        forward = self._layer.self_attn.attn.forward

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = forward(q, k, v, forward_batch)
            if attended.dtype != self._dtype or not attended.is_contiguous():
                return attended.to(self._dtype).contiguous()
            return attended

        return self._for(rows)(positions, hidden_states, residual, attend)

    def _for(self, rows: int) -> Layer:
        """The layer for so many rows, of the weights as they lie now."""
        pointers = [tensors[name].data_ptr() for tensors, name in self._sources]
        if pointers != self._pointers:
            self._pointers, self._made = pointers, {}
        made = self._made.get(rows)
        if made is None:
            weights, settings = weights_of(self._layer), settings_of(self._layer)
            sizes = LayerSizes.of(weights, settings, rows)
            if sizes not in self._memories:
                self._memories[sizes] = LayerMemory(sizes)
            memory = self._memories[sizes]
            made = self._made[rows] = make_layer(weights, settings, memory, backend="cpu")
        return made

    def _is_watched(self) -> bool:
        """Whether somebody wants to see what passes between the parts; hooks are there by the first
        step or never."""
        if self._watched is None:
            self._watched = any(
                part._forward_hooks or part._forward_pre_hooks
                for name, part in self._layer.named_modules()
                if name
            )
        return self._watched


def weights_of(layer: Any) -> LayerWeights:
    """The tensors of a layer, where they lie."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        norm=layer.input_layernorm.weight.data,
        qkv=attention.qkv_proj.weight.data,
        qkv_bias=_data(attention.qkv_proj.bias),
        out=attention.o_proj.weight.data,
        out_bias=_data(attention.o_proj.bias),
        norm_after=layer.post_attention_layernorm.weight.data,
        gate_up=mlp.gate_up_proj.weight.data,
        down=mlp.down_proj.weight.data,
        cos_sin=attention.rotary_emb.cos_sin_cache,
    )


def settings_of(layer: Any) -> LayerSettings:
    """What a layer is besides its tensors."""
    attention = layer.self_attn
    return LayerSettings(
        num_qo_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        eps=layer.input_layernorm.variance_epsilon,
        eps_after=layer.post_attention_layernorm.variance_epsilon,
        interleaved=not attention.rotary_emb.is_neox_style,
    )


def _data(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.data


def _sources(layer: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the tensors of :func:`weights_of` hang: a new one in an old one's place is seen."""
    attention, mlp = layer.self_attn, layer.mlp
    for module in (
        layer.input_layernorm,
        attention.qkv_proj,
        attention.o_proj,
        layer.post_attention_layernorm,
        mlp.gate_up_proj,
        mlp.down_proj,
    ):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module._parameters, name
    yield attention.rotary_emb._buffers, "cos_sin_cache"


def _is_plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    columns, rows = (attention.qkv_proj, mlp.gate_up_proj), (attention.o_proj, mlp.down_proj)
    linears = (*columns, *rows)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    rope = attention.rotary_emb
    if (
        not all(cpu_layers.plain_linear(part) for part in linears)
        or not all(cpu_layers.plain_norm(part) for part in norms)
        or not cpu_layers.plain_rope(rope)
        or hasattr(rope, "sin_cos_cache")
        or any(part.tp_size > 1 or part.skip_bias_add for part in linears)
        or any(part.gather_output for part in columns)
        or any(part.use_decode_attn_tp for part in rows)
        or any(part.bias is not None for part in (mlp.gate_up_proj, mlp.down_proj))
        or type(mlp.act_fn) is not SiluAndMul
        or rope.head_size != attention.head_dim
        or attention.attn.v_head_dim != attention.head_dim
    ):
        return False
    try:
        weights_of(layer).check(settings_of(layer))
    except ValueError:
        return False
    return True
