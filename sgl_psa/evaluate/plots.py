"""Plots of result rows as inline SVG; needs matplotlib (the ``eval`` extra)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from sgl_psa.evaluate.results import Row

_COLUMNS = 3
_MARKERS = "osD^vP*X<>hp"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "plots need matplotlib: pip install 'sgl-psa[eval]', then run the command again"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "sgl-psa"})
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    """The figure as an <svg> element, without XML prologue."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    _pyplot().close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    figure, axes = _pyplot().subplots(
        lines, columns, figsize=(4.1 * columns, 3.1 * lines), squeeze=False
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.axis("off")
    return figure, flat[:count]


def _look(curves: Sequence[str]) -> dict[str, dict[str, Any]]:
    colours = _pyplot().get_cmap("tab20").colors
    return {
        curve: {"color": colours[(i * 2 + i // 10) % 20], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, curve in enumerate(curves)
    }


def score_against_bytes(rows: Sequence[Row]) -> str:
    """A panel for each task and length; one curve a policy, bytes on a logarithmic axis."""
    cells = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    curves = list(dict.fromkeys(row["curve"] for row in rows if row["policy"] != "dense"))
    look = _look(curves)
    figure, panels = _panels(len(cells))
    for axes, (task, length) in zip(panels, cells, strict=True):
        here = [r for r in rows if (r["task"], r["length"]) == (task, length)]
        axes.axhline(here[0]["dense_score"], color="black", linewidth=0.8, linestyle="--")
        for curve in curves:
            points = sorted(
                (r["bytes_fraction"], r["score"])
                for r in here
                if r["curve"] == curve and r["bytes_fraction"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1.2, markersize=5, **look[curve])
        _log_shares(axes)
        axes.set_title(f"{task}, {length} tokens")
        axes.set_xlabel("bytes read / dense")
        axes.set_ylabel(here[0]["metric"])
        if here[0]["metric"] == "accuracy":
            axes.set_ylim(-0.03, 1.03)
        axes.grid(True, which="both", alpha=0.25)
    pyplot = _pyplot()
    handles = [pyplot.Line2D([], [], label=curve, **look[curve]) for curve in curves]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", label="dense"))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 0.97), frameon=False)
    figure.tight_layout()
    return _svg(figure)


def _log_shares(axes: Any) -> None:
    """A logarithmic axis of shares up to 1, with plain numbers."""
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(right=1.05)


def bytes_against_length(rows: Sequence[Row]) -> str:
    """Mean bytes fraction over the tasks, one curve a spec, both axes logarithmic."""
    specs = list(dict.fromkeys(row["spec"] for row in rows if row["policy"] != "dense"))
    look = _look(specs)
    figure, (axes,) = _panels(1)
    for spec in specs:
        lengths = sorted({row["length"] for row in rows if row["spec"] == spec})
        values = [
            _mean([r["bytes_fraction"] for r in rows if (r["spec"], r["length"]) == (spec, n)])
            for n in lengths
        ]
        axes.plot(lengths, values, label=spec, linewidth=1.2, markersize=5, **look[spec])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("bytes read / dense")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    return _svg(figure)


def budget_by_head(rows: Sequence[Row]) -> str:
    """A heat map for each spec: pages attended by layer and KV head, mean over tasks."""
    return _heat_maps(rows, "pages_by_head", "share of pages")


def rounds_by_head(rows: Sequence[Row]) -> str:
    """A heat map for each spec: rounds of the loop by layer and KV head, mean over tasks."""
    return _heat_maps(rows, "rounds_by_head", "rounds")


def _heat_maps(rows: Sequence[Row], column: str, label: str) -> str:
    specs = list(dict.fromkeys(row["spec"] for row in rows))
    figure, panels = _panels(len(specs))
    for axes, spec in zip(panels, specs, strict=True):
        tables = [row[column] for row in rows if row["spec"] == spec]
        mean = [
            [_mean([table[i][j] for table in tables]) for j in range(len(tables[0][0]))]
            for i in range(len(tables[0]))
        ]
        image = axes.imshow(mean, aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(spec)
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
        axes.set_xticks(range(len(mean[0])))
        peak = max(max(line) for line in mean)
        if len(mean) * len(mean[0]) <= 64:
            for i, line in enumerate(mean):
                for j, value in enumerate(line):
                    shade = "black" if value > 0.6 * peak else "white"
                    axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=shade)
        figure.colorbar(image, ax=axes, label=label)
    figure.tight_layout()
    return _svg(figure)


def coverage(points: Sequence[tuple[str, float, float]]) -> str:
    """Requested against mean achieved coverage; points are (curve, requested, achieved)."""
    curves = list(dict.fromkeys(curve for curve, _, _ in points))
    look = _look(curves)
    figure, (axes,) = _panels(1)
    lowest = min(min(asked, got) for _, asked, got in points)
    axes.plot([lowest, 1], [lowest, 1], color="black", linewidth=0.8, linestyle="--")
    for curve in curves:
        asked = sorted({point[1] for point in points if point[0] == curve})
        mine = [(x, _mean([p[2] for p in points if p[:2] == (curve, x)])) for x in asked]
        axes.plot(*zip(*mine, strict=True), label=curve, linewidth=1.2, **look[curve])
    axes.set_xlabel("coverage asked for")
    axes.set_ylabel("coverage achieved")
    axes.grid(True, alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _svg(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
