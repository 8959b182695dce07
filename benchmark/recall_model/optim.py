"""Muon for the matrices (Jordan et al. 2024: momentum, then an orthogonalised update)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass
class _Stack:
    """Equally shaped matrices, the factor of the rate for each, and their momentum."""

    parameters: list[nn.Parameter]
    factors: list[float]
    momentum: Tensor


class Muon:
    """Nesterov momentum over stacks of equally shaped matrices, given as (matrix, factor)."""

    def __init__(
        self,
        matrices: Iterable[tuple[nn.Parameter, float]],
        dtype: torch.dtype,
        weight_decay: float = 0.02,
    ) -> None:
        self.weight_decay, self.dtype = weight_decay, dtype
        groups: dict[tuple[int, ...], list[tuple[nn.Parameter, float]]] = {}
        for matrix, factor in matrices:
            groups.setdefault(tuple(matrix.shape), []).append((matrix, factor))
        self._stacks = {
            shape: _Stack(
                [m for m, _ in group], [f for _, f in group], torch.zeros(len(group), *shape)
            )
            for shape, group in groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        for shape, stack in self._stacks.items():
            gradient = torch.stack([p.grad for p in stack.parameters if p.grad is not None])
            average = stack.momentum.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(average, momentum), self.dtype)
            update *= max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, factor, change in zip(
                stack.parameters, stack.factors, update, strict=True
            ):
                step = rate * factor
                parameter.mul_(1 - step * self.weight_decay).add_(change, alpha=-step)

    def state_dict(self) -> dict[tuple[int, ...], Tensor]:
        return {shape: stack.momentum for shape, stack in self._stacks.items()}

    def load_state_dict(self, state: dict[tuple[int, ...], Tensor]) -> None:
        for shape, value in state.items():
            self._stacks[shape].momentum.copy_(value)
