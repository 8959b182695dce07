"""Flags: the last coordinates of an embedding say what kind of token it is.

    LINE     newline and the three line markers
    CHAIN    '>' positive; '#' and '?' negative
    NEWLINE  newline
    NUMBER   the tokens 000 to 999

Training keeps the flags and the constant coordinate as they are: heads compare them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .lexicon import Lexicon

AFTER_QUERY = -0.4  # CHAIN flag of '#' and '?'; that of '>' is 1


class Flag(IntEnum):
    """Coordinate of a flag, counted from the first of them."""

    LINE = 0
    CHAIN = 1
    NEWLINE = 2
    NUMBER = 3


@dataclass(frozen=True)
class KnownTokens:
    """Token ids that the construction treats apart; markers are '#', '?', '>'."""

    newline: int
    markers: tuple[int, int, int]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, lexicon: Lexicon) -> KnownTokens:
        first = {s: ids[0] for s, ids in lexicon.symbols.items()}
        return cls(first["\n"], (first["#"], first["?"], first[">"]), tuple(lexicon.numbers))

    def flags(self, vocabulary: int) -> Tensor:
        """fp32 [vocabulary, 4]."""
        table = torch.zeros(vocabulary, len(Flag))
        table[[self.newline, *self.markers], Flag.LINE] = 1.0
        table[list(self.markers), Flag.CHAIN] = torch.tensor([AFTER_QUERY, AFTER_QUERY, 1.0])
        table[self.newline, Flag.NEWLINE] = 1.0
        table[list(self.numbers), Flag.NUMBER] = 1.0
        return table


@dataclass(frozen=True)
class FixedCoordinates:
    """Gives the constant and the flags their share of every embedding.

    constant: its coordinate; share: of the length of the rest of the embedding; flags: fp32
    [vocabulary, 4] from KnownTokens, in units of the constant.
    """

    constant: int
    share: float
    flags: Tensor

    @torch.no_grad()
    def hold(self, table: Tensor) -> None:
        """Set them in embedding [vocabulary, width]; call it after every optimiser step.

        Layer 0 finds places by comparing constants after normalisation: a token with a larger
        share than its neighbours would draw their attention.
        """
        table[:, self.constant] = 0
        table[:, -len(Flag) :] = 0
        table[:, self.constant] = self.share * table.norm(dim=1)
        table[:, -len(Flag) :] = self.flags * table[:, self.constant, None]
