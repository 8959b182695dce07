"""Frames of each layer over time, as a picture; needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT = 4.6, 3.2


def residency(snapshots: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """A panel for each cache: the frames that its layers held, stacked, step by step.

    Args:
        snapshots: title -> :meth:`sgl_psa.memory.tiered_cache.TieredCache.snapshot`.
        path: where the picture goes; its ending says in which format.

    Raises:
        ValueError: no matplotlib, nothing to draw, or a snapshot without samples.
    """
    pyplot = _pyplot()
    if not snapshots:
        raise ValueError("residency plot: no snapshots given")
    figure, panels = pyplot.subplots(
        1,
        len(snapshots),
        figsize=(_WIDTH * len(snapshots), _HEIGHT),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, snapshot) in zip(panels[0], snapshots.items(), strict=True):
        draw(axes, snapshot, title)
    panels[0][0].set_ylabel("frames")
    layers = len(next(iter(snapshots.values()))["frames_by_layer"])
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in _colours(layers)]
    names = [f"layer {i}" for i in range(layers)]
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def draw(axes: Any, snapshot: Mapping[str, Any], title: str) -> None:
    """One cache on matplotlib ``axes``; the dashed line is what the device tier holds."""
    history = snapshot["history"]
    if not history["steps"]:
        raise ValueError(f"residency plot: {title!r} has no samples; run more decode steps")
    by_layer: Sequence[Sequence[int]] = list(zip(*history["frames"], strict=True))
    axes.stackplot(history["steps"], by_layer, colors=_colours(len(by_layer)), step="post")
    axes.axhline(snapshot["num_frames"], color="black", linestyle="--", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("decode step")
    axes.set_ylim(0)


def _colours(count: int) -> list[Any]:
    shades = _pyplot().get_cmap("viridis")
    return [shades(i / max(count - 1, 1)) for i in range(count)]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "plots need matplotlib: pip install 'sgl-psa[eval]', then run the command again"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
