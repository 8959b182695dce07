"""What ``min_context="auto"`` stands for: from which context on sparse decoding is faster."""

from __future__ import annotations

from sgl_psa.config import AUTO, PSAConfig

#: Tokens of context, by kernel backend. ``cpu``: for the head shapes of ``python -m
#: benchmark.crossover`` at the default settings 1536 with one thread, one request or four, 3072 at
#: most with two threads. The others have not been measured on a machine that they are for.
CROSSOVER = {
    "cpu": 3072,
    "torch": 1024,
    "triton": 1024,
    "flashinfer": 1024,
    "reference": 1024,
}


def min_context(config: PSAConfig, backend: str) -> int:
    """Tokens below which a request is decoded densely.

    Args:
        backend: kernel backend, from :func:`sgl_psa.backends.resolve_backend`.
    """
    return CROSSOVER[backend] if config.min_context == AUTO else config.min_context
