"""New rows of K and V in plain torch: the specification."""

import torch


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See :func:`sgl_psa_kernels.kv_write.kv_write`."""
    places = slots.tolist()
    for i, slot in enumerate(places):
        if not 0 <= slot < len(k_cache):
            raise ValueError(f"kv_write: slots[{i}] lies outside of the pool")
    for i, slot in enumerate(places):
        k_cache[slot] = k[i]
        v_cache[slot] = v[i]
