"""Constructed initial weights: the model starts with working multi-token induction.

Layer 0: head j reads the token j places back (rotated constant queries against constant keys)
and writes a projection of it into its own subspace.  Layers 1 and 2: heads match what the
current place knows about tokens 0..n-1 back with what a candidate knows about tokens 1..n back,
and copy the candidate's token to the output.  Later layers and all MLPs start as usual.
Everything is trained afterwards.  The idea follows the induction heads of Olsson et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Block, RecallModel, Shape

OFFSETS = (1, 2, 3, 4)
_POSITION_PAIRS = 8  # fastest rotary pairs: the sharp place code
_CONTENT_PAIRS = 20  # slowest rotary pairs: nearly unrotated over the context


@dataclass(frozen=True)
class Strengths:
    """Sizes of the constructed parts, tuned on the recall accuracy before any training."""

    noise: float = 0.15
    constant: float = 0.12
    place: float = 7.0
    place_write: float = 0.07
    match: float = 2.4
    match_deep: float = 3.0
    copy: float = 0.16
    marker: float = 0.6


def _projection(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows [rows, width] that ignore the last (constant) coordinate."""
    basis = torch.linalg.qr(torch.randn(width, rows, generator=generator))[0].T.contiguous()
    basis[:, -1] = 0
    return basis


def _offset_heads(block: Block, shape: Shape, read: Tensor, write: list[Tensor],
                  strengths: Strengths) -> None:
    """read [head_dim, width] sees the token; write[j] [head_dim, width] stores offset j + 1."""
    dim, half, pairs = shape.head_dim, shape.head_dim // 2, _POSITION_PAIRS
    speed = shape.rope_theta ** (-torch.arange(pairs).float() / half)
    normed_constant = strengths.constant / (0.04**2 + strengths.constant**2 / shape.width) ** 0.5
    size = strengths.place / normed_constant
    for head in range(shape.kv_heads):
        block.k[head * dim:head * dim + pairs, -1] = size
        block.v[head * dim:(head + 1) * dim] = read
    for head, offset in enumerate(OFFSETS[:shape.heads]):
        start = head * dim
        block.q[start:start + pairs, -1] = size * torch.cos(offset * speed)
        block.q[start + half:start + half + pairs, -1] = -size * torch.sin(offset * speed)
        block.o[:, start:start + dim] = strengths.place_write * write[head].T


def _match_heads(block: Block, shape: Shape, depth: int, strength: float, copy: float,
                 known: list[Tensor], read: list[Tensor], shift: int) -> None:
    """One constructed head per KV head.

    known[j] [head_dim, width] reads the token j back (j = 0: the token itself); depth of these
    are matched, each with its share of the content dimensions, taken from row `shift` on.
    """
    dim, half, group = shape.head_dim, shape.head_dim // 2, shape.heads // shape.kv_heads
    slow = torch.cat((torch.arange(half - _CONTENT_PAIRS, half),
                      torch.arange(dim - _CONTENT_PAIRS, dim)))
    for kv in range(shape.kv_heads):
        query, key = kv * group * dim, kv * dim
        for j in range(depth):
            rows = slow[j::depth]
            part = (torch.arange(len(rows)) + shift + kv * 32) % dim
            block.q[query + rows] = strength * known[j][part]
            block.k[key + rows] = strength * known[j + 1][part]
        block.v[key:key + dim] = read[kv]
        block.o[:, query:query + dim] = copy * read[kv].T


@torch.no_grad()
def construct(model: RecallModel, markers: list[int], seed: int = 0,
              strengths: Strengths | None = None) -> None:
    """Overwrite the random weights of layers 0 to 2 in place.

    markers: token ids of '#', '?' and '>', which get a common part so that they match.
    """
    size = strengths or Strengths()
    shape, generator = model.shape, torch.Generator().manual_seed(seed)
    model.embedding[:, -1] = size.constant
    shared = model.embedding[markers[0]].clone()
    for marker in markers[1:]:
        mixed = size.marker * shared + (1 - size.marker**2) ** 0.5 * model.embedding[marker]
        mixed[-1] = size.constant
        model.embedding[marker] = mixed
    blocks = [b for b in model.blocks if isinstance(b, Block)]
    for block in blocks[:3]:
        for matrix in (block.q, block.k, block.v, block.o):
            matrix.mul_(size.noise)
    dim = shape.head_dim
    token = _projection(dim, shape.width, generator)
    stores = _projection(len(OFFSETS) * dim, shape.width, generator)
    offsets = [stores[j * dim:(j + 1) * dim] for j in range(len(OFFSETS))]
    known = [token, *offsets]
    output = _projection(2 * dim, shape.width, generator)
    read = [output[:dim], output[dim:]]
    _offset_heads(blocks[0], shape, token, offsets, size)
    _match_heads(blocks[1], shape, 2, size.match, 0.5 * size.copy, known, read, shift=0)
    _match_heads(blocks[2], shape, 3, size.match_deep, size.copy, known, read, shift=16)
