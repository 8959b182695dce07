"""merge_state in Triton."""

import torch

from sgl_psa_kernels.triton_support import kernels, power_of_two


def merge_state(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.merge_state.merge_state`."""
    module = kernels("merge_state", "merge_state.triton_kernels", o_a, lse_a, o_b, lse_b)
    o_a, lse_a, o_b, lse_b = (t.contiguous() for t in (o_a, lse_a, o_b, lse_b))
    o, lse = torch.empty_like(o_a), torch.empty_like(lse_a)
    rows, dim = lse.numel(), o.shape[-1]
    if rows:
        with torch.cuda.device_of(o):
            module.merge[(-(-rows // 8),)](
                o_a, lse_a, o_b, lse_b, o, lse, rows, D=dim, DT=power_of_two(dim), ROWS=8
            )
    return o, lse
