"""Which kernels run: chosen once at start-up, never replaced silently."""

from __future__ import annotations

import logging

import torch

from sgl_psa.config import ConfigError

logger = logging.getLogger(__name__)


def resolve_backend(asked: str, device: torch.device | str) -> str:
    """The kernel backend for ``device``: ``"cpu"`` (C++) or ``"reference"`` (torch).

    Args:
        asked: ``auto``, ``cpu`` or ``reference``.
        device: where the KV cache lives.

    Raises:
        ConfigError: ``cpu`` was asked for and cannot run; the message says what is missing.
    """
    from sgl_psa_kernels._native import native_available

    on_cpu = torch.device(device).type == "cpu"
    if asked == "reference" or (asked == "auto" and not on_cpu):
        return "reference"
    if not on_cpu:
        raise ConfigError(f"backend=cpu cannot serve KV on {device}: use auto or reference")
    available, reason = native_available()
    if available:
        return "cpu"
    if asked == "cpu":
        raise ConfigError(f"backend=cpu cannot run: {reason}")
    logger.warning("PSA decodes with the torch reference, correct but slow: %s", reason)
    return "reference"
