"""Watermarks: how many tokens of a page, from its start, were written without a gap."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.watermark import reference, torch_batched, triton_backend

_IMPLEMENTATIONS = {
    "reference": reference.advance,
    "torch": torch_batched.advance,
    "triton": triton_backend.advance,
}


def advance(watermark: torch.Tensor, slots: torch.Tensor, *, page_size: int, backend: str) -> None:
    """Record that tokens were written to ``slots``, in place.

    A run of consecutive slots inside a page extends the page's watermark to the run's end if it
    begins at the page's first slot (the page starts anew) or not beyond the watermark. A run that
    would leave a gap changes nothing. A page that several runs reach in one call ends with what
    one of them says.

    Args:
        watermark: int32 [num_pages], written.
        slots: int64 [N] in write order, slot numbers within the pool.
        page_size: tokens per page.
        backend: "reference", "torch" (any device) or "triton" (CUDA). There is no C++ kernel.

    Raises:
        ValueError: unknown backend, bad shapes or dtypes.
        RuntimeError: backend "triton" without a CUDA device.
    """
    op = "watermark"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.check_page_size(op, page_size)
    checks.check_tensor(op, "watermark", watermark, torch.int32, (None,))
    checks.check_tensor(op, "slots", slots, torch.int64, (None,))
    implementation(watermark, slots, page_size)


__all__ = ["advance"]
