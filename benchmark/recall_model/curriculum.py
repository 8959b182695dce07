"""Stages of growing row length.

A stage ends when the running answer accuracy passes its gate, or when its share of the time is
over.  The constructed start already matches at every length, so short rows, which are cheap,
teach ordinary text, chains and colliding keys, and long rows refine; position jumps reach beyond
the row length in every stage.
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
    Stage(
        512,
        4096,
        0.30,
        0.999,
        Mix(
            text=0.40,
            needle=0.10,
            dense=0.4,
            chain=0.45,
            styled=0.2,
            hard=0.4,
            max_position=8192,
            jump=0.7,
        ),
    ),
    Stage(
        1024,
        4096,
        0.50,
        0.999,
        Mix(
            text=0.35,
            needle=0.12,
            dense=0.4,
            chain=0.45,
            styled=0.2,
            hard=0.4,
            max_position=12288,
            jump=0.7,
        ),
    ),
    Stage(
        2048,
        4096,
        0.72,
        0.999,
        Mix(
            text=0.30,
            needle=0.15,
            dense=0.45,
            chain=0.45,
            styled=0.2,
            hard=0.35,
            max_position=14336,
            jump=0.65,
        ),
    ),
    Stage(
        4096,
        8192,
        0.89,
        0.999,
        Mix(
            text=0.25,
            needle=0.15,
            dense=0.45,
            chain=0.45,
            styled=0.2,
            hard=0.3,
            max_position=16384,
            jump=0.6,
        ),
    ),
    Stage(
        8192,
        8192,
        1.01,
        2.0,
        Mix(
            text=0.20,
            needle=0.15,
            dense=0.5,
            chain=0.45,
            styled=0.2,
            hard=0.3,
            max_position=16384,
            jump=0.5,
        ),
    ),
)


def learning_rate(progress: float, step: int) -> float:
    """Factor in [0, 1]: 40 warm-up steps, constant, linear decay over the last 60 %."""
    decay = min(1.0, max(0.03, (1.0 - progress) / 0.6))
    return min(1.0, (step + 1) / 40) * decay
