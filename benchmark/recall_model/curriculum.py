"""Stages of growing row length.

A stage ends when the running answer accuracy passes its gate, or when its share of the time is
over.  Lengths 128 to 1024 teach matching; 2048 to 8192 teach long range; position jumps reach
beyond the row length from the second stage on.
"""

from __future__ import annotations

from dataclasses import dataclass

from .rows import Mix


@dataclass(frozen=True)
class Stage:
    """length: tokens a row; until: last share of the total time; gate: answer accuracy."""

    length: int
    batch_tokens: int
    until: float
    gate: float
    mix: Mix


STAGES = (
    Stage(128, 4096, 0.05, 0.80, Mix(
        text=0.08, needle=0.0, dense=0.9, chain=0.10, copy=0.4, hard=0.3, short_keys=True,
        max_position=512, jump=0.3)),
    Stage(256, 4096, 0.11, 0.86, Mix(
        text=0.10, needle=0.08, dense=0.6, chain=0.20, copy=0.15, styled=0.1,
        max_position=4096, jump=0.6)),
    Stage(512, 4096, 0.18, 0.90, Mix(
        text=0.15, needle=0.15, dense=0.5, chain=0.30, copy=0.05, styled=0.25,
        max_position=8192, jump=0.7)),
    Stage(1024, 4096, 0.33, 0.95, Mix(
        text=0.22, needle=0.2, dense=0.4, chain=0.30, styled=0.25,
        max_position=12288, jump=0.7)),
    Stage(2048, 8192, 0.60, 0.985, Mix(
        text=0.25, needle=0.2, dense=0.4, chain=0.30, styled=0.25,
        max_position=14336, jump=0.65)),
    Stage(4096, 8192, 0.83, 0.995, Mix(
        text=0.22, needle=0.2, dense=0.4, chain=0.30, styled=0.25,
        max_position=16384, jump=0.6)),
    Stage(8192, 8192, 1.01, 2.0, Mix(
        text=0.18, needle=0.2, dense=0.45, chain=0.30, styled=0.25,
        max_position=16384, jump=0.5)),
)


def learning_rate(progress: float, step: int) -> float:
    """Factor in [0, 1]: 40 warm-up steps, constant, linear decay over the last 35 %."""
    decay = 1.0 if progress < 0.65 else max(0.04, (1.0 - progress) / 0.35)
    return min(1.0, (step + 1) / 40) * decay
