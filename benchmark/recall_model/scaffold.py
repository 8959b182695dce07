"""Constructed initial weights: before any training the model already completes set lines.

division.py says how the residual stream is divided, heads.py holds the heads.

Layer 0: head j attends to the token j + 1 places back (constant keys against constant queries
rotated by the offset) and writes that token's projected code into store j.
Layer 1: all heads compare (token, stores 1-3) of the current place with (stores 1-4) of every
earlier place, and copy the code of the token found there to the output: induction over four
tokens (induction heads: Olsson et al. 2022).  The comparison uses the slowest rotary pairs, which
hardly turn within the context.  The second head of each group passes over newlines unless the
current token is a number: in a chain `> B A` the longest match is the end of the line `# B A`,
and the next shorter one, `# A 482`, is what the chain needs.
Layer 2: the first head attends to the latest newline or line marker; after `>` it lowers the
newline, after `#` and `?` it raises it.
Layers 3 and up and the MLPs start as usual, and the weights are trained afterwards; only the MLP
of layer 0 stays at zero, because whatever it writes blurs the codes that layer 1 compares.
"""

from __future__ import annotations

import torch

from .division import Division, Strengths
from .flags import FixedCoordinates, KnownTokens
from .heads import line_head, match_heads, offset_heads
from .model import Block, RecallModel

BUILT_LAYERS = 3


@torch.no_grad()
def construct(
    model: RecallModel, tokens: KnownTokens, seed: int = 0, strengths: Strengths | None = None
) -> FixedCoordinates:
    """Overwrite the embedding and the attention of layers 0 to 2 in place.

    Returns what has to be held after every optimiser step.
    """
    size = strengths or Strengths()
    blocks = [b for b in model.blocks if isinstance(b, Block)]
    for name in ("gate", "up", "down", "norm_mlp"):
        getattr(blocks[0], name).requires_grad_(False)
    for weight in (blocks[0].v, blocks[0].o):
        weight.mul_(size.noise)
    at = Division(model, tokens, size, seed)
    at.embedding()
    offset_heads(at, blocks[0])
    match_heads(at, blocks[1])
    line_head(at, blocks[2])
    return at.fixed


def built_parameters(model: RecallModel) -> set[str]:
    """Names of the constructed attention matrices, which learn at a lower rate."""
    return {f"blocks.{layer}.{name}" for layer in range(BUILT_LAYERS) for name in "qkvo"}
