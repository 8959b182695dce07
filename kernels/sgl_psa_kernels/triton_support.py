"""What the Triton implementations share: when they can run, lazy loading, tile shapes.

Triton is imported when an operator is first called with ``backend="triton"``, never before: the
package works without it. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the kernels
on CPU tensors in Triton's interpreter (tests; slow).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from sgl_psa_kernels.checks import require

#: Elements that places of pages are counted in: every head dimension is a multiple, so that loads
#: from a place are seen to be aligned.
PLACE_UNIT = 16


def interpreted() -> bool:
    """Whether kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_available(device: torch.device | str) -> tuple[bool, str]:
    """(usable, what is missing and how to get it) for tensors on ``device``."""
    kind = torch.device(device).type
    if kind == "cpu" and not interpreted():
        return False, (
            "Triton kernels need a CUDA device; for tests on the CPU set TRITON_INTERPRET=1 before "
            "Python starts"
        )
    if kind not in ("cpu", "cuda"):
        return False, f"Triton kernels run on CUDA devices, not on {kind}"
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is missing; pip install triton==3.6.0"
    return True, ""


def kernels(op: str, module: str, *tensors: torch.Tensor | None) -> ModuleType:
    """Import the kernels of ``op`` for tensors that are all on one usable device.

    Raises:
        ValueError: tensors on several devices, or float64 tensors.
        RuntimeError: Triton cannot run there; the message says what is missing.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    devices = sorted({str(tensor.device) for tensor in given})
    require(len(devices) == 1, f"{op}: tensors are on {' and '.join(devices)}; move them together")
    require(
        all(tensor.dtype != torch.float64 for tensor in given),
        f"{op}: float64 is for backend='reference'; convert the tensors",
    )
    available, reason = triton_available(given[0].device)
    if not available:
        raise RuntimeError(f"{op}: {reason}")
    return importlib.import_module(f"sgl_psa_kernels.{module}")


def power_of_two(number: int, least: int = 1) -> int:
    """Smallest power of two that is no less than ``number`` and ``least``."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def head_tile(group: int) -> int:
    """Rows of the query tile of a KV head: a matrix product needs at least 16."""
    return power_of_two(group, 16)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton's element type of matrix products: that of the inputs, but float32 for bfloat16 in the
    interpreter, which cannot compute with it."""
    import triton.language as tl

    if interpreted() and dtype == torch.bfloat16:
        return tl.float32
    return {
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
    }[dtype]


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; of the interpreter: few, so that programs have several turns
    of their loops."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
