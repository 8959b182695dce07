"""Constructed initial weights: before any training the model already completes set lines.

The residual stream of `width` coordinates is divided: the first half is the token's code (random,
of equal length for every token) with one constant coordinate at its end, the second half holds
four stores, for projections of the codes of the tokens 1, 2, 3 and 4 places back.

Layer 0: head j attends to the token j + 1 places back (constant keys against constant queries
rotated by the offset) and writes that token's projected code into store j.
Layer 1: all heads compare (token, stores 1-3) of the current place with (stores 1-4) of every
earlier place, and copy the code of the token found there to the output: induction over four
tokens (induction heads: Olsson et al. 2022).  The comparison uses the slowest rotary pairs, which
hardly turn within the context.
Layers 2 and up and the MLPs start as usual, and the weights are trained afterwards; only the MLP
of layer 0 stays at zero, because whatever it writes blurs the codes that layer 1 compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Block, RecallModel

OFFSETS = 4
BUILT_LAYERS = 2
# Weights of the fastest rotary pairs in the place code.  The fastest ones count most: the right
# place must win by more than tokens differ in length.
_PLACE_WEIGHTS = (3.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.25, 0.25)
_CONTENT_PAIRS = 18


@dataclass(frozen=True)
class Strengths:
    """Sizes of the constructed parts, chosen by the recall accuracy before training.

    code, spread: standard deviations of the code and of the other coordinates of an embedding;
    constant: its constant coordinate; constant_share: the share of an embedding's length that this
    coordinate keeps in training; place, match: square roots of attention score scales;
    value: gain of the value projections; copy: length of the copied code against the token's own;
    recency: weight of the comparison with 0, 1, 2, 3 tokens back; marker: likeness of the line
    markers; noise: scale of the random part of built matrices.
    """

    code: float = 0.055
    spread: float = 0.004
    constant: float = 0.2
    constant_share: float = 0.26
    place: float = 12.0
    match: float = 5.0
    value: float = 0.25
    copy: float = 4.0
    recency: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    marker: float = 0.85
    noise: float = 0.1


class _Builder:
    """The division of the residual stream and the projections that layers 0 and 1 share."""

    def __init__(self, model: RecallModel, size: Strengths, seed: int) -> None:
        self.model, self.size, self.shape = model, size, model.shape
        self.generator = torch.Generator().manual_seed(seed)
        self.constant = self.shape.width // 2 - 1
        self.store = self.shape.width // 2 // OFFSETS
        codes = torch.randn(self.constant, self.store, generator=self.generator)
        self.project = torch.linalg.qr(codes)[0].T.contiguous()  # [store, constant]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def store_start(self, offset: int) -> int:
        """First coordinate of the store of the token `offset` places back (1 to OFFSETS)."""
        return self.constant + 1 + (offset - 1) * self.store

    def embedding(self, markers: list[int]) -> None:
        table, size, split = self.model.embedding, self.size, self.constant
        codes = self._random(table.shape[0], split)
        for marker in markers[1:]:
            codes[marker] = (
                size.marker * codes[markers[0]] + (1 - size.marker**2) ** 0.5 * codes[marker]
            )
        table[:, :split] = codes / codes.norm(dim=1, keepdim=True) * size.code * split**0.5
        table[:, split] = size.constant
        rest = self._random(table.shape[0], table.shape[1] - split - 1)
        table[:, split + 1 :] = size.spread * rest
        self.scale = table.pow(2).sum(1).mean().div(self.shape.width).sqrt().item()

    def offset_heads(self, block: Block) -> None:
        shape, size, dim = self.shape, self.size, self.shape.head_dim
        weight = torch.tensor(_PLACE_WEIGHTS).sqrt()
        pairs, half = len(weight), dim // 2
        speed = shape.rope_theta ** (-torch.arange(pairs).float() / half)
        strength = size.place * self.scale / size.constant * weight
        block.q.zero_()
        block.k.zero_()
        for head in range(shape.kv_heads):
            start = head * dim
            block.k[start : start + pairs, self.constant] = strength
            block.v[start : start + self.store] = 0
            block.v[start : start + self.store, : self.constant] = size.value * self.project
        for head in range(min(OFFSETS, shape.heads)):
            start, offset = head * dim, head + 1
            block.q[start : start + pairs, self.constant] = strength * torch.cos(offset * speed)
            block.q[start + half : start + half + pairs, self.constant] = -strength * torch.sin(
                offset * speed
            )
            block.o[:, start : start + self.store] = 0
            rows = self.store_start(offset) + torch.arange(self.store)
            block.o[rows, start + torch.arange(self.store)] = self.scale / size.value

    def match_heads(self, block: Block) -> None:
        shape, size, dim = self.shape, self.size, self.shape.head_dim
        half, group = dim // 2, shape.heads // shape.kv_heads
        slow = torch.cat(
            (torch.arange(half - _CONTENT_PAIRS, half), torch.arange(dim - _CONTENT_PAIRS, dim))
        )
        block.q.zero_()
        block.k.zero_()
        block.v.zero_()
        block.o.zero_()
        share = -(-self.constant // shape.kv_heads)
        for kv in range(shape.kv_heads):
            key = kv * dim
            copied = torch.arange(kv * share, min((kv + 1) * share, self.constant))
            block.v[key + torch.arange(len(copied)), copied] = size.value
            for back, weight in enumerate(size.recency):
                rows = slow[back::OFFSETS]
                part = (torch.arange(len(rows)) + kv * self.store // shape.kv_heads) % self.store
                block.k[key + rows, self.store_start(back + 1) + part] = size.match
                for head in range(kv * group, (kv + 1) * group):
                    query = head * dim + rows
                    if back == 0:
                        block.q[query, : self.constant] = size.match * weight * self.project[part]
                    else:
                        block.q[query, self.store_start(back) + part] = size.match * weight
            for head in range(kv * group, (kv + 1) * group):
                block.o[copied, head * dim + torch.arange(len(copied))] = (
                    size.copy * self.scale / size.value / group
                )


@torch.no_grad()
def hold_constant(model: RecallModel, strengths: Strengths | None = None) -> None:
    """Give every embedding the same share of its length in the constant coordinate.

    Layer 0 finds places by comparing constants after normalisation: a token with a larger share
    than its neighbours would draw their attention.  Call it after every optimiser step.
    """
    table, at = model.embedding, model.shape.width // 2 - 1
    squares = table.pow(2).sum(1) - table[:, at].pow(2)
    share = (strengths or Strengths()).constant_share
    table[:, at] = share / (1 - share**2) ** 0.5 * squares.sqrt()


@torch.no_grad()
def construct(
    model: RecallModel, markers: list[int], seed: int = 0, strengths: Strengths | None = None
) -> None:
    """Overwrite embedding and the attention of layers 0 and 1 in place.

    markers: token ids of '#', '?' and '>', which get similar codes so that lines match.
    """
    size = strengths or Strengths()
    blocks = [b for b in model.blocks if isinstance(b, Block)]
    for block in blocks[:BUILT_LAYERS]:
        block.v.mul_(size.noise)
        block.o.mul_(size.noise)
    for name in ("gate", "up", "down", "norm_mlp"):
        getattr(blocks[0], name).requires_grad_(False)
    builder = _Builder(model, size, seed)
    builder.embedding(markers)
    builder.offset_heads(blocks[0])
    builder.match_heads(blocks[1])


def built_parameters(model: RecallModel) -> set[str]:
    """Names of the constructed attention matrices."""
    return {f"blocks.{layer}.{name}" for layer in range(BUILT_LAYERS) for name in "qkvo"}
