"""Which kernels run: chosen once at start-up, never replaced silently."""

from __future__ import annotations

import logging

import torch

from sgl_psa.config import ConfigError

logger = logging.getLogger(__name__)


def resolve_backend(asked: str, device: torch.device | str) -> str:
    """The kernel backend for ``device``: ``cpu`` (C++), ``triton``, ``torch`` or ``reference``.

    Args:
        asked: one of these, or ``auto``: C++ on CPUs, torch elsewhere. On CUDA devices ``auto``
            stays with torch until ``triton`` has been measured on one.
        device: where the KV cache lives.

    Raises:
        ConfigError: the one that was asked for cannot run on ``device``; the message says what is
            missing.
    """
    from sgl_psa_kernels._native import native_available

    on_cpu = torch.device(device).type == "cpu"
    if asked == "reference" and not on_cpu:
        raise ConfigError(f"backend=reference cannot serve KV on {device}: use auto or torch")
    if asked in ("reference", "torch"):
        return asked
    if asked == "triton":
        from sgl_psa_kernels.triton_support import triton_available

        available, reason = triton_available(device)
        if not available:
            raise ConfigError(f"backend=triton cannot serve KV on {device}: {reason}; or use auto")
        return asked
    if not on_cpu:
        if asked == "cpu":
            raise ConfigError(f"backend=cpu cannot serve KV on {device}: use auto or torch")
        return "torch"
    available, reason = native_available()
    if available:
        return "cpu"
    if asked == "cpu":
        raise ConfigError(f"backend=cpu cannot run: {reason}")
    logger.warning("PSA decodes with torch instead of its C++ kernels, which is slower: %s", reason)
    return "torch"
