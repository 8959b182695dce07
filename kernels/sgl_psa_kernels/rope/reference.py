"""Rotary position embedding in plain torch: the specification."""

import torch


def rope(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    head_dim: int,
    interleaved: bool,
) -> None:
    """See :func:`sgl_psa_kernels.rope.rope`."""
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < len(cos_sin):
        raise ValueError("rope: positions lie outside of cos_sin")
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    dim = cos_sin.shape[1]
    for x in (q, k):
        rotated = x.unflatten(1, (-1, head_dim))[..., :dim]
        if interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        turned = first * cos - second * sin
        second.copy_(second * cos + first * sin)
        first.copy_(turned)
