"""Key sketches: binding of the C++ kernels."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import call, dtype_code, require_cpu
from sgl_psa_kernels.key_sketch.prepared import PreparedScore


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
    """See :func:`sgl_psa_kernels.key_sketch.write`."""
    op = "key_sketch.write"
    require_cpu(op, k_cache, slots, codes, affine, signs)
    args = abi.SketchWriteArgs(
        num_kv_heads=k_cache.shape[1],
        head_dim=k_cache.shape[2],
        page_size=page_size,
        dtype=dtype_code(op, k_cache),
        bits=bits,
        num_threads=torch.get_num_threads(),
        count=slots.shape[0],
        num_slots=codes.shape[0] * page_size,
        k_token_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1),
        k=k_cache.data_ptr(),
        slots=slots.data_ptr(),
        codes=codes.data_ptr(),
        affine=affine.data_ptr(),
        signs=None if signs is None else signs.data_ptr(),
        in_order=in_order,
    )
    call(op, "psa_sketch_write", args)


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
    """See :func:`sgl_psa_kernels.key_sketch.score`."""
    op = "key_sketch.score"
    require_cpu(op, log_mass)
    if log_mass is None:
        log_mass = torch.empty(q.shape[0], q.shape[1], page_table.shape[1], dtype=torch.float32)
    prepared = PreparedScore(
        q,
        codes[None],
        affine[None],
        watermark[None],
        page_table,
        seq_lens,
        active,
        candidates,
        None,
        bits=bits,
        page_size=page_size,
    )
    prepared(0, q, log_mass, sm_scale)
    return log_mass
