"""Merge two partial attention results by log-sum-exp."""

import torch

from sgl_psa_kernels.backend import choose
from sgl_psa_kernels.checks import require
from sgl_psa_kernels.merge_state import reference, triton_backend

_IMPLEMENTATIONS = {
    "reference": reference.merge_state,
    "torch": reference.merge_state,
    "triton": triton_backend.merge_state,
}


def merge_state(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    backend: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint token sets from the results over each.

    The identity is the one of FlashAttention's split-KV reduction: a softmax over a union is the
    mean of the parts' outputs weighted by exp(lse).

    Args:
        o_a, o_b: [..., D] outputs (any float dtype, the same).
        lse_a, lse_b: [...] natural-log log-sum-exp of the logits of each part; -inf = empty part.
        backend: "reference" and "torch" (the same, any device) or "triton" (CUDA).

    Returns:
        (o [..., D] in the dtype of ``o_a``, lse [...] in the dtype of ``lse_a``). Where both parts
        are empty: o = 0 and lse = -inf.

    Raises:
        ValueError: unknown backend, shapes do not match.
        RuntimeError: backend "triton" without a CUDA device.
    """
    implementation = choose(backend, _IMPLEMENTATIONS, "merge_state")
    require(
        o_a.shape == o_b.shape and lse_a.shape == lse_b.shape and o_a.shape[:-1] == lse_a.shape,
        f"merge_state: outputs {list(o_a.shape)}, {list(o_b.shape)} and log-sum-exps "
        f"{list(lse_a.shape)}, {list(lse_b.shape)} do not belong together",
    )
    return implementation(o_a, lse_a, o_b, lse_b)


__all__ = ["merge_state"]
