"""Which kernels run: chosen once at start-up, never replaced silently."""

from __future__ import annotations

import logging

import torch

from sgl_psa.config import ConfigError

logger = logging.getLogger(__name__)

#: The backends whose decode steps never wait for the device, so that a CUDA graph can hold them.
NEVER_WAITING = ("triton", "flashinfer")


def resolve_backend(asked: str, device: torch.device | str) -> str:
    """The kernel backend for ``device``: ``cpu`` (C++), ``triton``, ``flashinfer``, ``torch`` or
    ``reference``.

    Args:
        asked: one of these, or ``auto``: C++ on CPUs, triton on CUDA devices, torch elsewhere and
            where what they need is missing. Whether triton's are right on a device is for
            :mod:`sgl_psa.kernel_check` to say.
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
    if asked in ("triton", "flashinfer"):
        available, reason = _on_cuda(asked, device)
        if not available:
            raise ConfigError(f"backend={asked} cannot serve KV on {device}: {reason}; or use auto")
        return asked
    if not on_cpu:
        if asked == "cpu":
            raise ConfigError(f"backend=cpu cannot serve KV on {device}: use auto or torch")
        available, reason = _on_cuda("triton", device)
        if available:
            return "triton"
        logger.warning("PSA decodes with torch, which is slower than Triton's kernels: %s", reason)
        return "torch"
    available, reason = native_available()
    if available:
        return "cpu"
    if asked == "cpu":
        raise ConfigError(f"backend=cpu cannot run: {reason}")
    logger.warning("PSA decodes with torch instead of its C++ kernels, which is slower: %s", reason)
    return "torch"


def _on_cuda(asked: str, device: torch.device | str) -> tuple[bool, str]:
    """(usable, what is missing and how to get it)."""
    from sgl_psa_kernels.progressive_decode.flashinfer_rows import flashinfer_available
    from sgl_psa_kernels.triton_support import triton_available

    available, reason = triton_available(device)
    if available and asked == "flashinfer":
        return flashinfer_available()
    return available, reason


def check_cache(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    """Refuse a KV cache that ``backend`` cannot attend.

    Raises:
        ConfigError: naming what it can.
    """
    if backend == "flashinfer":
        from sgl_psa_kernels.progressive_decode import flashinfer_rows

        try:
            flashinfer_rows.check("backend=flashinfer", dtype, head_dim)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def around(backend: str) -> str:
    """The backend of the kernels around decode attention: FlashInfer has none of them."""
    return "triton" if backend == "flashinfer" else backend
