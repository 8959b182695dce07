"""The prefix of a prefill in blocks: part of the result's definition, wherever the prefix lies."""

from collections.abc import Iterable, Iterator

import torch

from sgl_psa_kernels import checks

#: Prefix tokens that attention takes together; of 16-bit ones there may be float32 copies.
BLOCK_TOKENS = 8192

#: k and v [block, Hkv, D] of consecutive tokens.
Blocks = Iterable[tuple[torch.Tensor, torch.Tensor]]


def split(k: torch.Tensor, v: torch.Tensor, block_tokens: int) -> Blocks:
    """A prefix [Lp, Hkv, D] that lies in one piece, block by block."""
    return zip(k.split(block_tokens), v.split(block_tokens), strict=True)


def checked(blocks: Blocks, like: torch.Tensor, block_tokens: int) -> Iterator[tuple]:
    """``blocks``, each looked at when it comes.

    Args:
        like: keys [S, Hkv, D] of the chunk.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a block that is not the last
            and has not ``block_tokens`` tokens: the result would depend on where it was cut.
    """
    op, ended = "prefill_attention", False
    for k, v in blocks:
        checks.require(
            k.shape == v.shape and k.dim() == 3 and k.shape[1:] == like.shape[1:],
            f"{op}: prefix block of k {list(k.shape)}, of v {list(v.shape)} and k_chunk "
            f"{list(like.shape)} do not belong together",
        )
        checks.require(
            k.dtype == v.dtype == like.dtype,
            f"{op}: q, keys and values must have one dtype; q is {like.dtype}",
        )
        checks.require(
            not ended and 0 < len(k) <= block_tokens,
            f"{op}: prefix blocks must have {block_tokens} tokens, the last one 1 to as many",
        )
        ended = len(k) < block_tokens
        yield k, v
