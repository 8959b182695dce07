"""Planar packing of low-bit codes.

Byte j of a packed row of W bytes holds the elements j, j + W, j + 2W, ..., lowest bits first, so
that a shift and a mask of the whole row yield W consecutive elements.
"""

import torch

BITS = (1, 2, 4)


def packed_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one packed key."""
    return head_dim * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., D] in 0 .. 2^bits - 1 into uint8 [..., D * bits // 8]."""
    planes = codes.unflatten(-1, (8 // bits, -1))
    packed = torch.zeros_like(planes[..., 0, :])
    for plane in range(8 // bits):
        packed |= planes[..., plane, :] << (bits * plane)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 [..., W] to uint8 codes [..., W * 8 // bits]."""
    planes = [(packed >> (bits * plane)) & (2**bits - 1) for plane in range(8 // bits)]
    return torch.cat(planes, dim=-1)
