"""What ``group_percent="auto"`` stands for: how groups of pages grow."""

from __future__ import annotations

from sgl_psa.config import AUTO, PSAConfig

#: Percentage of the pages attended so far, by kernel backend. A GPU is as good as idle while it
#: reads a group of a few pages, and each group costs it a few microseconds: there a row should take
#: few of them, and large ones.
GROWTH = {"cpu": 0, "torch": 0, "triton": 100, "flashinfer": 100, "reference": 0}


def group_percent(config: PSAConfig, backend: str) -> int:
    """Pages of a group as a percentage of those attended before it; ``group_pages`` at least.

    Args:
        backend: kernel backend, from :func:`sgl_psa.backends.resolve_backend`.
    """
    return GROWTH[backend] if config.group_percent == AUTO else config.group_percent
