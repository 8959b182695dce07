"""Triton kernel of merge_state."""

import triton
import triton.language as tl

from sgl_psa_kernels.triton_tiles import finite, log_add


@triton.jit
def merge(
    o_a, lse_a, o_b, lse_b, o, lse, N,
    D: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of contiguous outputs [N, D] and log-sum-exps [N]. Grid (blocks of ROWS rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DT)
    a = tl.load(lse_a + row, mask=row < N, other=0.0).to(tl.float32)
    b = tl.load(lse_b + row, mask=row < N, other=0.0).to(tl.float32)
    both = log_add(a, b)
    weight_a = tl.exp(a - finite(both))[:, None]
    weight_b = tl.exp(b - finite(both))[:, None]
    at = row[:, None] * D + dims[None, :]
    inside = (row < N)[:, None] & (dims < D)[None, :]
    # An empty part has weight 0, but its output may hold anything, NaN included.
    part_a = tl.load(o_a + at, mask=inside & (weight_a > 0), other=0.0).to(tl.float32)
    part_b = tl.load(o_b + at, mask=inside & (weight_b > 0), other=0.0).to(tl.float32)
    tl.store(o + at, part_a * weight_a + part_b * weight_b, mask=inside)
    tl.store(lse + row, both, mask=row < N)
