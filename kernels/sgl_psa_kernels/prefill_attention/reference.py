"""Two-part prefill attention as one plain softmax: the specification."""

import torch


def prefill(
    q: torch.Tensor,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    k_chunk: torch.Tensor,
    v_chunk: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`sgl_psa_kernels.prefill_attention.prefill`; float64 computes in float64."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k_chunk if k_prefix is None else torch.cat([k_prefix, k_chunk])
    values = v_chunk if v_prefix is None else torch.cat([v_prefix, v_chunk])
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
