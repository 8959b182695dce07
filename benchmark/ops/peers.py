"""What dense attention costs with torch alone, and what reading its bytes costs at least."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmark.ops.op import Op
from benchmark.ops.setting import Setting
from benchmark.ops.stream import stream_read
from sgl_psa.huge_pages import zero_in_huge_pages

_KV = "K and V of every token"


def ops(s: Setting) -> list[Op]:
    """``stream_read``; ``torch_native``, as SGLang's backend of that name does it: gather each
    request's K and V by slot, then SDPA; SDPA alone on contiguous K and V."""
    rows = [s.slots[b] for b in range(s.batch)]
    # SGLang's own pools have the heads of a token side by side.
    beside = tuple([_side_by_side(layer) for layer in pool] for pool in (s.k, s.v))

    def read(layer: int) -> None:
        stream_read(s.k[layer])
        stream_read(s.v[layer])

    def gathered(layer: int) -> None:
        for b, slots in enumerate(rows):
            k, v = (pool[layer][slots].movedim(0, 1)[None] for pool in beside)
            scaled_dot_product_attention(
                s.q[b][None, :, None], k, v, scale=s.scale, enable_gqa=True
            )

    contiguous = [
        tuple(pool[layer][s.slots].transpose(1, 2).contiguous() for pool in (s.k, s.v))
        for layer in range(min(s.layers, 2))
    ]
    q = s.q[:, :, None]

    def sdpa(layer: int) -> torch.Tensor:
        k, v = contiguous[layer % len(contiguous)]
        return scaled_dot_product_attention(q, k, v, scale=s.scale, enable_gqa=True)

    pool_bytes = 2 * s.k[0].numel() * s.k[0].element_size()
    dense = {"bytes": s.layer_bytes, "counted": _KV, "pages_fraction": 1.0, "whole": True}
    return [
        Op("stream_read", "cpu", read, pool_bytes, "the pools of K and V"),
        Op("torch_native", "torch_native", gathered, **dense),
        Op("sdpa_contiguous", "torch", sdpa, **dense),
    ]


def _side_by_side(pool: torch.Tensor) -> torch.Tensor:
    made = torch.empty(pool.shape, dtype=pool.dtype)
    zero_in_huge_pages(made)
    return made.copy_(pool)
