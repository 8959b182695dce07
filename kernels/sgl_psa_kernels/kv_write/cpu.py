"""New rows of K and V: binding of the C++ kernel."""

import torch

from sgl_psa_kernels._native import abi
from sgl_psa_kernels._native.call import PreparedCall, require_cpu

OP = "kv_write"


class PreparedWrite:
    """:func:`sgl_psa_kernels.kv_write.kv_write` into the caches of one layer."""

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """
        Args:
            k_cache, v_cache: as for the operator, which checks them.
        """
        require_cpu(OP, k_cache, v_cache)
        self._keep = (k_cache, v_cache)
        self._k, self._v = (
            ((cache.shape[1:], cache.dtype), cache.element_size()) for cache in (k_cache, v_cache)
        )
        k_size, v_size = self._k[1], self._v[1]
        args = abi.KvWriteArgs(
            num_slots=k_cache.shape[0],
            k_slot=k_cache.stride(0) * k_size,
            k_cache_head=k_cache.stride(1) * k_size,
            v_slot=v_cache.stride(0) * v_size,
            v_cache_head=v_cache.stride(1) * v_size,
            k_bytes=k_cache.shape[2] * k_size,
            v_bytes=v_cache.shape[2] * v_size,
            num_kv_heads=k_cache.shape[1],
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
        )
        self._call = PreparedCall(OP, "psa_kv_write", args)

    def serves(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> bool:
        """Whether the operator takes these for the caches."""
        return (
            (k.shape[1:], k.dtype) == self._k[0]
            and (v.shape[1:], v.dtype) == self._v[0]
            and slots.dtype == torch.int64
            and len(k) == len(v) == len(slots)
            and k.stride(2) == v.stride(2) == 1
            and slots.is_contiguous()
        )

    def __call__(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Write rows that it serves.

        Raises:
            ValueError: a slot outside of the caches.
        """
        args, k_size, v_size = self._call.args, self._k[1], self._v[1]
        args.count = len(slots)
        k_row, k_head, _ = k.stride()
        v_row, v_head, _ = v.stride()
        args.k_row, args.k_head = k_row * k_size, k_head * k_size
        args.v_row, args.v_head = v_row * v_size, v_head * v_size
        args.k, args.v, args.slots = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        self._call()


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See :func:`sgl_psa_kernels.kv_write.kv_write`."""
    require_cpu(OP, k, v, slots)
    PreparedWrite(k_cache, v_cache)(k, v, slots)
