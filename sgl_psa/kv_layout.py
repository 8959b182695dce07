"""Where the KV heads of a resident pool lie.

On CPUs each head has its rows for itself, as FlashInfer's layout "HND" has: a sparse head reads
whole pages of memory in place of a row here and there, which takes an eighth of the address
translations. The tensor's shape stays the one of SGLang's pools, only its strides are others.
"""

from __future__ import annotations

import torch

from sgl_psa.huge_pages import zero_in_huge_pages


def zeros_heads_first(
    slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A layer's K or V, zeros, [slots, Hkv, D] as a view of memory in the order [Hkv, slots, D].

    On Linux the memory comes in huge pages and is taken when it is first written.
    """
    memory = torch.empty(num_kv_heads, slots, head_dim, dtype=dtype, device=device)
    zero_in_huge_pages(memory)
    return memory.permute(1, 0, 2)
