"""What every benchmark shares: where results go, the machine's description, medians, plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmark.panels import save_panels

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def spread(samples: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of several runs."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "runs": len(samples),
    }


def integers(text: str) -> list[int]:
    """``"1,2"`` as a list, for command lines."""
    return [int(part) for part in text.split(",")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a JSON list; the file is complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


def save(name: str, report: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with the hardware added; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"hardware": hardware(), **report}, indent=1) + "\n")
    return path


def plot_lines(
    name: str, series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str
) -> Path:
    """Write ``results/NAME.png``: one line a series, both axes logarithmic."""
    return save_panels(RESULTS / f"{name}.png", {"": series}, xlabel, ylabel)
