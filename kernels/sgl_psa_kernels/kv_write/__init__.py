"""New rows of K and V into a layer's cache."""

import torch

from sgl_psa_kernels import checks
from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.kv_write import cpu, reference
from sgl_psa_kernels.kv_write.cpu import PreparedWrite

_IMPLEMENTATIONS = {"reference": reference.kv_write, "cpu": cpu.kv_write}

__all__ = ["PreparedWrite", "kv_write"]


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    backend: str,
) -> None:
    """Row i of ``k`` and ``v`` to ``slots[i]`` of the caches, in the order of i.

    Args:
        k, v: [N, Hkv, Dk] and [N, Hkv, Dv]; heads and rows may lie apart.
        k_cache, v_cache: [slots, Hkv, Dk] and [slots, Hkv, Dv], of the dtypes of k and v, any
            strides of slots and heads; overwritten.
        slots: int64 [N], contiguous; of a slot given twice the last row stays.
        backend: "reference" or "cpu" (C++).

    Raises:
        ValueError: unknown backend, shapes and dtypes that do not belong together, or a slot
            outside of the caches; then nothing is written.
        RuntimeError: backend "cpu" without a usable native library.
    """
    op = "kv_write"
    implementation = choose(backend, _IMPLEMENTATIONS, op)
    checks.check_tensor(op, "slots", slots, torch.int64, (None,))
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if cache.dim() != 3 or cache.stride(2) != 1:
            raise ValueError(
                f"{op}: {name}_cache must be [slots, Hkv, D] with contiguous elements of a head, "
                f"got {list(cache.shape)}"
            )
        checks.check_tensor(
            op, name, rows, cache.dtype, (len(slots), *cache.shape[1:]), contiguous=False
        )
        if rows.stride(2) != 1:
            raise ValueError(f"{op}: last dimension of {name} must be contiguous")
    if k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"{op}: k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} differ in "
            "slots or heads"
        )
    implementation(k, v, k_cache, v_cache, slots)
