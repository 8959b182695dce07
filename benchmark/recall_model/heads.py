"""The constructed heads; see scaffold.py for what they do together."""

from __future__ import annotations

import torch

from .division import OFFSETS, Division
from .flags import Flag
from .model import Block

# Weights of the fastest rotary pairs in the place code.  The fastest ones count most: the right
# place must win by more than tokens differ in length.
_PLACE_WEIGHTS = tuple(w for w in (1.5, 1.0, 0.75, 0.5, 0.25, 0.25, 0.125, 0.125) for _ in range(2))
# Slowest rotary pairs, which compare contents; the two coordinates of the slowest carry flags.
_CONTENT_PAIRS = 32
# Rotary pairs and weights that tell the nearer of two markers: fast ones for neighbours, slower
# ones so that no far marker is in phase with all of them.
_RECENCY = {8: 1.0, 10: 2.5, **dict.fromkeys(range(12, 28, 2), 1.0)}


def offset_heads(at: Division, block: Block) -> None:
    """Head j attends j + 1 places back and fills store j + 1."""
    shape, size, dim = at.shape, at.size, at.shape.head_dim
    weight = torch.tensor(_PLACE_WEIGHTS).sqrt()
    pairs, half = len(weight), dim // 2
    speed = shape.rope_theta ** (-torch.arange(pairs).float() / half)
    strength = size.place / at.unit * weight
    block.q.zero_()
    block.k.zero_()
    for head in range(shape.kv_heads):
        start = head * dim
        block.k[start : start + pairs, at.constant] = strength
        block.v[start : start + at.store] = 0
        block.v[start : start + at.store - 1, : at.constant] = size.value * at.project
        block.v[start + at.store - 1, at.flags + Flag.LINE] = size.value
        block.v[start + at.store - 1, at.flags + Flag.NEWLINE] = -size.value
    for head in range(min(OFFSETS, shape.heads)):
        start, offset = head * dim, head + 1
        block.q[start : start + pairs, at.constant] = strength * torch.cos(offset * speed)
        block.q[start + half : start + half + pairs, at.constant] = -strength * torch.sin(
            offset * speed
        )
        block.o[:, start : start + at.store] = 0
        rows = at.store_start(offset) + torch.arange(at.store)
        block.o[rows, start + torch.arange(at.store)] = at.scale / size.value


def match_heads(at: Division, block: Block) -> None:
    """Induction over four tokens.

    The second head of a group passes over newlines, unless the current token is a number, and
    prefers places up to three tokens behind a key's marker.
    """
    shape, size, dim = at.shape, at.size, at.shape.head_dim
    half, group = dim // 2, shape.heads // shape.kv_heads
    slow = torch.cat(
        (
            torch.arange(half - _CONTENT_PAIRS, half - 1),
            torch.arange(dim - _CONTENT_PAIRS, dim - 1),
        )
    )
    slowest = (half - 1, dim - 1)
    for weight in (block.q, block.k, block.v, block.o):
        weight.zero_()
    share = -(-at.constant // shape.kv_heads)
    for kv in range(shape.kv_heads):
        key = kv * dim
        copied = torch.arange(kv * share, min((kv + 1) * share, at.constant))
        block.v[key + torch.arange(len(copied)), copied] = size.value
        block.k[key + slowest[0], at.flags + Flag.NEWLINE] = size.pass_over
        for back in range(2, OFFSETS + 1):  # a marker right before it makes it the key itself
            block.k[key + slowest[1], at.store_start(back) + at.store - 1] = size.set_line
        for back, weight in enumerate(size.recency):
            rows = slow[back::OFFSETS]
            part = (torch.arange(len(rows)) + kv * at.store // shape.kv_heads) % (at.store - 1)
            block.k[key + rows, at.store_start(back + 1) + part] = size.match
            for head in range(kv * group, (kv + 1) * group):
                query = head * dim + rows
                if back == 0:
                    block.q[query, : at.constant] = size.match * weight * at.project[part]
                else:
                    block.q[query, at.store_start(back) + part] = size.match * weight
        for head in range(kv * group, (kv + 1) * group):
            block.o[copied, head * dim + torch.arange(len(copied))] = (
                size.copy * at.scale / size.value / group
            )
        second = (kv * group + 1) * dim
        block.q[second + slowest[0], at.constant] = -size.pass_over
        block.q[second + slowest[0], at.flags + Flag.NUMBER] = size.pass_over
        block.q[second + slowest[1], at.constant] = size.set_line


def line_head(at: Division, block: Block) -> None:
    """Head 0 attends to the latest newline or marker and moves the newline's logit."""
    size, dim = at.size, at.shape.head_dim
    rows = torch.tensor(list(_RECENCY))
    strength = size.line / at.unit * torch.tensor(list(_RECENCY.values())).sqrt()
    block.q[:dim] = 0
    block.q[rows, at.constant] = strength
    block.k[:dim] = 0
    block.k[rows, at.flags + Flag.LINE] = strength
    block.k[rows, at.flags + Flag.NEWLINE] = -size.newline * strength
    block.v[0] = 0
    block.v[0, at.flags + Flag.CHAIN] = 1
    newline = at.model.embedding[at.tokens.newline, : at.constant]
    block.o[:, 0] = 0
    block.o[: at.constant, 0] = -size.mode * size.copy / at.unit * newline
