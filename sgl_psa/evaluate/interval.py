"""How sure a difference between two policies on the same questions is."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959964


def paired_difference(
    grades: Sequence[float], dense: Sequence[float]
) -> tuple[float, float, float]:
    """Mean difference of grades on the same questions, and its 95 % interval.

    The interval is the adjusted Wald one of Bonett and Price (2012), which adds one question for
    and one against: it has a width where no grade differs, and holds for small counts. Questions
    count as independent.

    Args:
        grades, dense: 0 to 1, one a question, in the same order.

    Returns:
        The mean difference, then both ends of the interval, in -1 to 1.

    Raises:
        ValueError: not the same number of questions, or none.
    """
    if len(grades) != len(dense) or not grades:
        raise ValueError(f"{len(grades)} and {len(dense)} grades cannot be paired")
    differences = [a - b for a, b in zip(grades, dense, strict=True)]
    count = len(differences) + 2
    centre = sum(differences) / count
    spread = (sum(d * d for d in differences) + 2) / count - centre**2
    half = _Z * math.sqrt(spread / count)
    mean = sum(differences) / len(differences)
    return mean, max(-1.0, centre - half), min(1.0, centre + half)
