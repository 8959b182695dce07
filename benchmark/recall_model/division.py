"""How the constructed weights divide the residual stream, and how strong they are.

The `width` coordinates are, in order:

    code      random, of equal length for every token; what induction copies
    constant  one coordinate with the same share of every embedding
    stores    four, for the tokens 1, 2, 3 and 4 places back: projected code, and one coordinate
              that is set if that token is a line marker
    flags     four, what kind of token this is (see flags.py); nothing else writes there
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .flags import FixedCoordinates, Flag, KnownTokens
from .model import RecallModel

OFFSETS = 4


@dataclass(frozen=True)
class Strengths:
    """Sizes of the constructed parts, chosen by the recall accuracy before training.

    code, spread: standard deviations of the code and of the other coordinates of an embedding;
    constant: size of its constant coordinate and its flags, of the length of the rest;
    place, match: square roots of attention score scales; value: gain of the value projections;
    copy: length of the copied code against the token's own; recency: weight of the comparison
    with 0, 1, 2, 3 tokens back; marker: likeness of the line markers; pass_over, set_line, line:
    square roots of the score scales of the penalty on newlines, of the preference for set lines
    and of the line head; newline: how much less the line head attends to newlines than to
    markers; mode: how much of a copied code `>` takes from the newline; noise: scale of the
    random part of built matrices.
    """

    code: float = 0.055
    spread: float = 0.004
    constant: float = 0.27
    place: float = 12.0
    match: float = 5.0
    value: float = 0.25
    copy: float = 4.0
    recency: tuple[float, ...] = (1.0, 0.9, 0.8, 0.6)
    marker: float = 0.85
    pass_over: float = 8.0
    set_line: float = 3.5
    line: float = 20.0
    newline: float = 0.15
    mode: float = 0.7
    noise: float = 0.1


class Division:
    """The division of the residual stream, and the projection of codes into stores."""

    def __init__(self, model: RecallModel, tokens: KnownTokens, size: Strengths, seed: int) -> None:
        self.model, self.tokens, self.size, self.shape = model, tokens, size, model.shape
        self.generator = torch.Generator().manual_seed(seed)
        width = self.shape.width
        self.constant = width // 2 - 1
        self.flags = width - len(Flag)
        self.store = (self.flags - width // 2) // OFFSETS
        codes = torch.randn(self.constant, self.store - 1, generator=self.generator)
        self.project = torch.linalg.qr(codes)[0].T.contiguous()  # [store - 1, constant]
        self.fixed = FixedCoordinates(
            self.constant, size.constant, tokens.flags(self.shape.vocabulary)
        )

    def store_start(self, offset: int) -> int:
        """First coordinate of the store of the token `offset` places back (1 to OFFSETS)."""
        return self.constant + 1 + (offset - 1) * self.store

    def embedding(self) -> None:
        table, size, split = self.model.embedding, self.size, self.constant
        codes = torch.randn(table.shape[0], split, generator=self.generator)
        first, *others = self.tokens.markers
        for marker in others:
            codes[marker] = size.marker * codes[first] + (1 - size.marker**2) ** 0.5 * codes[marker]
        table[:, :split] = codes / codes.norm(dim=1, keepdim=True) * size.code * split**0.5
        rest = torch.randn(table.shape[0], self.flags - split - 1, generator=self.generator)
        table[:, split + 1 : self.flags] = size.spread * rest
        self.fixed.hold(table)
        self.scale = table.pow(2).sum(1).mean().div(self.shape.width).sqrt().item()
        self.unit = table[:, split].mean().item() / self.scale  # constant after normalisation
