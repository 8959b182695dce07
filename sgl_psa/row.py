"""What a policy tells the progressive loop about one request."""

from __future__ import annotations

from typing import NamedTuple

#: Modes of the progressive loop; the numbers are part of the kernels' interface.
DENSE, MARGINAL, COVERAGE, CONSERVATIVE = 0, 1, 2, 3


class Row(NamedTuple):
    """One request's entry in the rule table that the kernels read.

    Attributes:
        mode: ``DENSE``, ``MARGINAL``, ``COVERAGE`` or ``CONSERVATIVE`` coverage.
        threshold: natural-log threshold of the stop rule (see :mod:`sgl_psa.stop`).
        kappa_floor: lowest residual correction, in nats; coverage rule only.
        kappa_std: standard deviations added to the mean residual; coverage rule only.
    """

    mode: int = DENSE
    threshold: float = 0.0
    kappa_floor: float = 0.0
    kappa_std: float = 0.0
