"""Which layer holds how much of the device tier, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Servers in the picture, if they have rows; else the first that do.
SHOWN = ("arena 25 %", "25 %, layer-even", "arena 10 %", "10 %, layer-even")


def residency(path: Path, rows: Sequence[dict[str, Any]]) -> Path | None:
    """Write a picture: one panel a server, the layers' shares of its frames over decode steps.

    Returns:
        ``path``, ``None`` if no row has a history.
    """
    # The last row of a server has its whole run.
    found = {r["system"]: r["residency"] for r in rows if (r["residency"] or {}).get("steps")}
    shown = [name for name in SHOWN if name in found] or list(found)[:4]
    if not shown:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(
        1, len(shown), figsize=(3.4 * len(shown) + 1, 3.4), sharey=True, squeeze=False
    )
    for axes, name in zip(row[0], shown, strict=True):
        history = found[name]
        layers = list(zip(*history["frames"], strict=True))
        shares = [[frames / history["num_frames"] for frames in layer] for layer in layers]
        labels = [f"layer {layer}" for layer in range(len(layers))]
        axes.stackplot(history["steps"], shares, labels=labels)
        axes.set_title(name)
        axes.set_xlabel("decode step")
        axes.set_ylim(0, 1)
    row[0][0].set_ylabel("share of the arena's frames")
    row[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
