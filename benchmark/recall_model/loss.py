"""Weighted cross-entropy on selected places of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SelectRows(torch.autograd.Function):
    """hidden [n, width] at distinct places [m]; the backward pass is a plain scatter."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = hidden.shape[0]
        return hidden[place]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        result = torch.zeros(ctx.rows, gradient.shape[1], dtype=gradient.dtype)
        result[place] = gradient
        return result, None


def weighted_loss(
    hidden: Tensor, embedding: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(scalar mean loss, per-place loss fp32 [m], per-place prediction int64 [m])."""
    logits = F.linear(hidden, embedding.to(hidden.dtype)).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    mean = (losses * weight).sum() / weight.sum()
    return mean, losses.detach(), logits.detach().argmax(-1)
