"""The random rotation of rotated sketches: random signs, then a Walsh-Hadamard transform.

A rotation spreads a key's large elements over all of its dimensions, so that few bits describe
every direction alike (RaBitQ, arXiv 2405.12497; the transform is QuaRot's, arXiv 2404.00456). Dot
products with a query that was rotated in the same way do not change.
"""

import torch

#: One rotation for all caches: sketches are a function of the key alone.
SEED = 20240512


def block_size(head_dim: int) -> int:
    """Elements that one transform mixes: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def rotation_signs(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The signs of the rotation, float32 [head_dim], each -1 or 1; always the same ones."""
    rng = torch.Generator().manual_seed(SEED)
    bits = torch.randint(0, 2, (head_dim,), generator=rng)
    return (bits * 2 - 1).float().to(device)


def rotate(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Rotate [..., D] to float32 [..., D].

    Additions and subtractions in a fixed order: the result of a row depends on nothing else, so a
    sketch is bit for bit the same whatever batch its key was written in.
    """
    size = x.shape[-1]
    block = block_size(size)
    y = (x.float() * sign).unflatten(-1, (size // block, block))
    half = 1
    while half < block:
        pairs = y.unflatten(-1, (block // (2 * half), 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


def rotation_matrix(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The rotation as a matrix, float32 [D, D]: ``x @ rotation_matrix`` rotates, for queries."""
    return rotate(torch.eye(head_dim, device=device), rotation_signs(head_dim, device))
