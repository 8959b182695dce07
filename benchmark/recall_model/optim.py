"""Muon for the matrices (Jordan et al. 2024: momentum, then an orthogonalised update)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the closest semi-orthogonal matrices of an fp32 [n, rows, columns] stack.

    Newton-Schulz iterations in dtype; bf16 is enough, fp32 is faster on some processors.
    """
    a, b, c = _COEFFICIENTS
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Nesterov momentum over stacks of equally shaped matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype,
                 weight_decay: float = 0.02) -> None:
        self.weight_decay, self.dtype = weight_decay, dtype
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self._momentum = {shape: torch.zeros(len(group), *shape)
                          for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        for shape, group in self._groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            average = self._momentum[shape].lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(average, momentum), self.dtype)
            update *= max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(change, alpha=-rate)

    def state_dict(self) -> dict[tuple[int, ...], Tensor]:
        return self._momentum

    def load_state_dict(self, state: dict[tuple[int, ...], Tensor]) -> None:
        for shape, value in state.items():
            self._momentum[shape].copy_(value)
