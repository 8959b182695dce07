"""Entry point of the ``sglang.srt.platforms`` group."""

from __future__ import annotations

from sglang_psa import compat

PLATFORM_CLASS = "sglang_psa.cpu_platform.PSACpuPlatform"


def activate() -> str | None:
    """Path of the CPU platform's class, ``None`` where there is a CUDA, ROCm or XPU device.

    A GPU server therefore keeps SGLang's own platform.
    """
    return None if compat.has_accelerator() else PLATFORM_CLASS
