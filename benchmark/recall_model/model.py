"""The Llama architecture for training: fp32 master weights, activations in a chosen dtype.

The parameters map one to one onto transformers' LlamaForCausalLM (see export.py).  The three
attention projections and the two gate projections are stored apart and joined at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def best_dtype() -> torch.dtype:
    """bf16 where the processor multiplies bf16 matrices in hardware tiles (AMX), else fp32."""
    try:
        tiles = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        tiles = False
    return torch.bfloat16 if tiles else torch.float32


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; positions: length of the rotary table."""

    vocabulary: int = 6144
    width: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    hidden: int = 576
    rope_theta: float = 500_000_000.0
    positions: int = 16384
    norm_eps: float = 1e-5


def _matrix(rows: int, columns: int, zero: bool = False) -> nn.Parameter:
    if zero:
        return nn.Parameter(torch.zeros(rows, columns))
    return nn.Parameter(torch.randn(rows, columns) * (0.5 / math.sqrt(columns)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [rows, length, heads, head_dim] in the half-split layout."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; [rows, length, width] to the same, in x's dtype."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        self.q = _matrix(s.heads * s.head_dim, s.width)
        self.k = _matrix(s.kv_heads * s.head_dim, s.width)
        self.v = _matrix(s.kv_heads * s.head_dim, s.width)
        self.o = _matrix(s.width, s.heads * s.head_dim, zero=True)
        self.gate = _matrix(s.hidden, s.width)
        self.up = _matrix(s.hidden, s.width)
        self.down = _matrix(s.width, s.hidden, zero=True)
        self.norm_attention = nn.Parameter(torch.ones(s.width))
        self.norm_mlp = nn.Parameter(torch.ones(s.width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (rows, length, _), dtype = self.shape, x.shape, x.dtype
        h = rms_norm(x, self.norm_attention, s.norm_eps)
        joined = F.linear(h, torch.cat((self.q, self.k, self.v), 0).to(dtype))
        heads = joined.view(rows, length, -1, s.head_dim)
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        group = s.heads // s.kv_heads
        k = k.repeat_interleave(group, 1)
        v = v.transpose(1, 2).repeat_interleave(group, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).reshape(rows, length, -1), self.o.to(dtype))
        h = rms_norm(x, self.norm_mlp, s.norm_eps)
        gate, up = F.linear(h, torch.cat((self.gate, self.up), 0).to(dtype)).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down.to(dtype))


class RecallModel(nn.Module):
    """Token ids and position ids, both int64 [rows, length], to final hidden states."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.04)
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        half = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angles = torch.outer(torch.arange(shape.positions).float(), shape.rope_theta**-half)
        table = torch.cat((angles, angles), -1)
        self.register_buffer("cos", table.cos().to(dtype), persistent=False)
        self.register_buffer("sin", table.sin().to(dtype), persistent=False)

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[rows, length, width] after the last norm; logits are its product with embedding."""
        x = F.embedding(ids, self.embedding).to(self.dtype)
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        for block in self.blocks:
            x = block(x, cos, sin)
        return rms_norm(x, self.norm, self.shape.norm_eps)
