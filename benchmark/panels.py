"""Plots of benchmarks: panels side by side, both axes logarithmic, one legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Sequence[tuple[float, float]]

_MARKERS = "o^sDvP*X"


def save_panels(
    path: Path,
    panels: Mapping[str, Mapping[str, Points]],
    xlabel: str,
    ylabel: str,
    bounds: Mapping[str, tuple[str, Points]] | None = None,
) -> Path:
    """Write a picture; returns its path.

    Args:
        panels: title -> label -> points; a label is drawn alike in all panels. Labels without
            points are left out.
        bounds: title -> (label, points) of a dashed line that the others are held against.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels) + 1, 5), squeeze=False, sharex=True, sharey=True
    )
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    shown = {}
    for (title, series), ax in zip(panels.items(), axes[0], strict=True):
        for label, points in series.items():
            if points:
                number = labels.index(label)
                style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}"}
                line = ax.plot(*zip(*sorted(points), strict=True), lw=0.9, ms=5, **style)
                shown.setdefault(label, line[0])
        if bounds and title in bounds:
            label, points = bounds[title]
            shown[label] = ax.plot(*zip(*points, strict=True), "k--", lw=1)[0]
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(xlabel)
        ax.set_title(title)
        ax.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel(ylabel)
    axes[0][-1].legend(
        shown.values(), shown.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def bandwidth_line(bytes_per_second: float, amounts: Sequence[float]) -> tuple[str, Points]:
    """The milliseconds that the least and the largest of ``amounts`` of bytes take at best."""
    ends = min(amounts), max(amounts)
    label = f"bandwidth, {bytes_per_second / 1e9:.1f} GB/s"
    return label, [(amount, amount / bytes_per_second * 1e3) for amount in ends]
