"""How the checks compare numbers."""

from __future__ import annotations

import torch


def close(name: str, got: torch.Tensor, want: torch.Tensor, relative: float, noise: float) -> float:
    """Largest error; raises where it is above ``relative * |want| + noise``."""
    got, want = got.double().cpu(), want.double().cpu()
    same = got == want
    error = torch.where(same, torch.zeros_like(got), (got - want).abs())
    bound = torch.where(same, torch.zeros_like(got), relative * want.abs() + noise)
    worst = float(error.max()) if error.numel() else 0.0
    if not bool((error <= bound).all()):
        raise AssertionError(f"{name}: error {worst:.3g} is above its bound")
    return worst
