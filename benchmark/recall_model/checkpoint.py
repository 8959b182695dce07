"""Complete training state on disk: weights, optimisers, curriculum place and clock."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .model import RecallModel, Shape
from .optim import Muon


@dataclass
class Progress:
    """Where training stands; elapsed: seconds; running: smoothed metrics by name."""

    seed: int
    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    elapsed: float = 0.0
    running: dict[str, float] = field(default_factory=dict)


def save(
    path: Path, model: RecallModel, muon: Muon, adam: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write beside the target, then rename: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "shape": asdict(model.shape),
            "model": model.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "progress": asdict(progress),
            "torch_rng": torch.get_rng_state(),
        },
        partial,
    )
    os.replace(partial, path)


def load_model(path: Path) -> RecallModel:
    """The model alone, fp32."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = RecallModel(Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    return model


def restore(path: Path, model: RecallModel, muon: Muon, adam: torch.optim.Optimizer) -> Progress:
    """Load everything in place and return the progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if Shape(**state["shape"]) != model.shape:
        raise ValueError(f"{path} holds a model of shape {state['shape']}")
    model.load_state_dict(state["model"])
    muon.load_state_dict(state["muon"])
    adam.load_state_dict(state["adam"])
    torch.set_rng_state(state["torch_rng"])
    return Progress(**state["progress"])
