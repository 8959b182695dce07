"""Who decodes now, when the working sets of the running requests do not all fit the arena.

The working set of a request is what its last decode steps attended. Attending more working sets
than there are frames makes every step load what the step before evicted; so only as many requests
decode as fit, and the others wait for a turn (working-set-aware batches: SparseServe, arXiv
2509.24626, which puts requests back into the queue instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A running request as the decision sees it.

    Attributes:
        frames: its working set.
        decodes: whether it took part in the newest decode step.
        since: the step at which its turn began, or since which it waits.
        leaves: it ends with its next step, so it takes part whatever it needs.
    """

    frames: int
    decodes: bool
    since: int
    leaves: bool = False


def choose(
    candidates: Sequence[Candidate], step: int, frames: int, *, quantum: int, slack: float
) -> list[bool]:
    """Whether each candidate takes part in a decode step.

    * A turn lasts at least ``quantum`` steps, unless working sets outgrow the arena; then those
      whose turn began last yield.
    * After it, a request yields when one that waits fits in its place; who waits longest comes
      first, and after ``quantum`` steps of waiting is not overtaken any more. So of N requests
      none waits longer than (N + 1) * ``quantum`` steps while working sets stay as they are.
    * Those that take part fit the arena, but for one whose working set alone does not, which
      decodes alone. One always does.

    Args:
        candidates: the running requests, in order of arrival.
        step: number of the step to come.
        frames: what the arena has for working sets.
        quantum: steps of a turn.
        slack: share of ``frames`` that stays free when a turn begins, so that a working set that
            grows a little displaces nobody.
    """
    chosen = [candidate.leaves for candidate in candidates]
    order = sorted(
        (i for i, c in enumerate(candidates) if not c.leaves), key=lambda i: candidates[i].since
    )
    turn = [i for i in order if candidates[i].decodes and step - candidates[i].since < quantum]
    waiting = [i for i in order if not candidates[i].decodes]
    over = [i for i in order if candidates[i].decodes and step - candidates[i].since >= quantum]
    used, alone = 0, True

    def take(index: int, room: float) -> bool:
        nonlocal used, alone
        if not alone and used + candidates[index].frames > room:
            return False
        used, alone = used + candidates[index].frames, False
        chosen[index] = True
        return True

    for index in turn:
        take(index, frames)
    for index in waiting:
        if not take(index, frames * (1 - slack)) and step - candidates[index].since >= quantum:
            break
    for index in reversed(over):
        take(index, frames)
    return chosen
