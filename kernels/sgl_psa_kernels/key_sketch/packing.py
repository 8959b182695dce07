"""Packing of low-bit codes, and the place of a packed key in the memory of its page.

Packing is planar: byte j of a packed key of W bytes holds the elements j, j + W, j + 2W, ...,
lowest bits first, so that a shift and a mask of the whole row yield W consecutive elements.

The P keys of a page and KV head (the last two dimensions, [P, W]) are stored transposed, in tiles
of T = min(P, 16) tokens: a tile is a list of columns, a column four bytes of each of its tokens,
token after token; if W is no multiple of four, the last column has W % 4 bytes a token. With
T = 16 a column is 64 bytes, in which 16 lanes of 32 bits hold the same elements of 16 keys: one
shift, mask and four-way byte product serves 16 tokens, and reads of neighbouring lanes coalesce.
"""

import torch

BITS = (1, 2, 4)
TILE_TOKENS = 16
COLUMN_BYTES = 4


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


def byte_places(offsets: torch.Tensor, page_size: int, width: int) -> torch.Tensor:
    """Where the bytes of packed keys lie among the ``page_size * width`` of their page.

    Args:
        offsets: int64 [N], places of the keys in their pages.
        width: bytes of one packed key.

    Returns:
        int64 [N, width].
    """
    tile = min(page_size, TILE_TOKENS)
    byte = torch.arange(width, device=offsets.device)
    column = byte // COLUMN_BYTES * COLUMN_BYTES  # its first byte
    column_bytes = (width - column).clamp(max=COLUMN_BYTES)
    token = offsets[:, None] % tile * column_bytes + byte - column
    return offsets[:, None] // tile * (tile * width) + tile * column + token


def packed_rows(codes: torch.Tensor) -> torch.Tensor:
    """Packed keys uint8 [..., P, W], one a row, of the codes [..., P, W] of pages as stored."""
    page_size, width = codes.shape[-2:]
    offsets = torch.arange(page_size, device=codes.device)
    return codes.flatten(-2)[..., byte_places(offsets, page_size, width)]
