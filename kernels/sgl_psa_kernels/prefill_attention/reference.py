"""Two-part prefill attention as one plain softmax: the specification."""

import torch

from sgl_psa_kernels.prefill_attention.blocks import Blocks


def prefill(
    q: torch.Tensor,
    prefix: Blocks,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.prefill_attention.prefill`; float64 computes in float64."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Copies: a block is gone when the next one is asked for.
    parts = [(k.clone(), v.clone()) for k, v in prefix]
    keys = torch.cat([*(k for k, _ in parts), k_chunk])
    values = torch.cat([*(v for _, v in parts), v_chunk])
    new, total = q.shape[0], keys.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=work)
    group = q.shape[1] // keys.shape[1]
    # Query i sits at position total - new + i and sees every key up to its own.
    hidden = torch.ones(new, total, dtype=torch.bool).triu(total - new + 1)
    for h in range(q.shape[1]):
        k = keys[:, h // group].to(work)
        v = values[:, h // group].to(work)
        logits = (sm_scale * q[:, h].to(work)) @ k.T
        logits = logits.masked_fill(hidden, float("-inf"))
        lse[:, h] = torch.logsumexp(logits, dim=1)
        out[:, h] = (torch.softmax(logits, dim=1) @ v).to(q.dtype)
    return out, lse
