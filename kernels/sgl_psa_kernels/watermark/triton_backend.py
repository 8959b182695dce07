"""Watermarks in Triton: one launch."""

import torch

from sgl_psa_kernels.triton_support import kernels, power_of_two


def advance(watermark: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """See :func:`sgl_psa_kernels.watermark.advance`; slot numbers are not checked."""
    module = kernels("watermark", "watermark.triton_kernels", watermark, slots)
    count = slots.shape[0]
    if count:
        with torch.cuda.device_of(watermark):
            module.advance[(count,)](
                watermark, slots, count,
                PAGE=page_size, BACK=power_of_two(page_size, 16), num_warps=1,
            )  # fmt: skip
