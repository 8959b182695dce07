"""Key sketches in Triton."""

import torch

from sgl_psa_kernels.key_sketch.codes import STEPS
from sgl_psa_kernels.key_sketch.rotation import block_size
from sgl_psa_kernels.triton_support import dot_dtype, head_tile, kernels, power_of_two

#: Tokens scored by one program.
TOKENS = 128


def write(
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    signs: torch.Tensor | None,
    *,
    bits: int,
    page_size: int,
    in_order: bool = False,
) -> None:
    """See :func:`sgl_psa_kernels.key_sketch.write`; slot numbers are not checked."""
    given = (k_cache, slots, signs, codes, affine)
    module = kernels("key_sketch.write", "key_sketch.triton_write", *given)
    _, num_kv, dim = k_cache.shape
    if slots.shape[0] == 0:
        return
    size, width = block_size(dim), codes.shape[3]
    with torch.cuda.device_of(k_cache):
        module.write[(slots.shape[0], num_kv)](
            *given, *k_cache.stride()[:2],
            BITS=bits, ROTATED=signs is not None, STEP=STEPS[bits],
            HKV=num_kv, D=dim, PAGE=page_size, WIDTH=width, WIDTH_T=power_of_two(width),
            ROWS=power_of_two(dim // size), SIZE=size, STEPS=size.bit_length() - 1,
            FACTOR=size**-0.5, IN_ORDER=in_order, num_warps=1,
        )  # fmt: skip


def score(
    q: torch.Tensor,
    codes: torch.Tensor,
    affine: torch.Tensor,
    watermark: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    active: torch.Tensor,
    candidates: torch.Tensor | None,
    log_mass: torch.Tensor | None,
    *,
    bits: int,
    page_size: int,
    sm_scale: float,
) -> torch.Tensor:
    """See :func:`sgl_psa_kernels.key_sketch.score`; page numbers are not checked."""
    given = (q, codes, affine, watermark, page_table, seq_lens, active, candidates)
    module = kernels("key_sketch.score", "key_sketch.triton_score", *given)
    batch, num_q, dim = q.shape
    num_kv, pages, width = codes.shape[1], page_table.shape[1], codes.shape[3]
    if log_mass is None:
        log_mass = torch.empty(batch, num_q, pages, dtype=torch.float32, device=q.device)
    if log_mass.numel() == 0:
        return log_mass
    split = q.dtype == torch.float32
    part = min(page_size, TOKENS)
    with torch.cuda.device_of(q):
        module.score[(batch * num_kv, -(-pages // (TOKENS // part)))](
            *given, log_mass, *q.stride()[:2], page_table.stride(0), pages, sm_scale,
            BITS=bits, ROTATED=affine.shape[3] == 1, CHOSEN=candidates is not None, SPLIT=split,
            HKV=num_kv, G=num_q // num_kv, GT=head_tile(num_q // num_kv),
            D=dim, DT=power_of_two(dim), WIDTH=width, WIDTH_T=power_of_two(width, 16),
            PAGE=page_size, PAGES=TOKENS // part, PART=part,
            DOT=dot_dtype(torch.float16 if split else q.dtype),
        )  # fmt: skip
    return log_mass
