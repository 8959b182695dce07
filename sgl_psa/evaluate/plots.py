"""Plots of result rows as inline SVG, one a panel; needs matplotlib (the ``eval`` extra).

Panels are small and come with a key of their own, so that a page can put them side by side or, on
a phone, one below the other.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sgl_psa.evaluate.results import Row

_SIZE = (4.1, 3.1)
_MARKERS = "osD^vP*X<>hp"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Look = Mapping[str, Mapping[str, Any]]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "plots need matplotlib: pip install 'sgl-psa[eval]', then run the command again"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any, alt: str, tight: str | None = "tight") -> str:
    """The figure as an <svg> element that reads as ``alt``; ids are its own within a page."""
    pyplot, buffer = _pyplot(), io.StringIO()
    pyplot.rcParams["svg.hashsalt"] = alt
    figure.savefig(buffer, format="svg", bbox_inches=tight, metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def _panel() -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=_SIZE)
    axes.grid(True, which="both", alpha=0.25)
    return figure, axes


def _look(curves: Sequence[str]) -> dict[str, dict[str, Any]]:
    colours = _pyplot().get_cmap("tab20").colors
    return {
        curve: {"color": colours[(i * 2 + i // 10) % 20], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, curve in enumerate(curves)
    }


def _key(look: Look, line: str | None = None) -> str:
    """The key of panels that share ``look``; ``line`` names the dashed black line."""
    pyplot = _pyplot()
    handles = [pyplot.Line2D([], [], label=curve, **style) for curve, style in look.items()]
    if line is not None:
        handles.append(pyplot.Line2D([], [], color="black", linestyle="--", label=line))
    figure = pyplot.figure(figsize=(_SIZE[0], 0.2 * len(handles) + 0.2))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    return _svg(figure, "Key: " + ", ".join(handle.get_label() for handle in handles), None)


def score_against_bytes(rows: Sequence[Row]) -> list[str]:
    """A panel for each task and length; one curve a policy, bytes on a logarithmic axis."""
    cells = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    look = _look(list(dict.fromkeys(row["curve"] for row in rows if row["policy"] != "dense")))
    least = min(row["bytes_fraction"] for row in rows)
    made = []
    for task, length in cells:
        here = [r for r in rows if (r["task"], r["length"]) == (task, length)]
        figure, axes = _panel()
        axes.axhline(here[0]["dense_score"], color="black", linewidth=0.8, linestyle="--")
        for curve, style in look.items():
            points = sorted((r["bytes_fraction"], r["score"]) for r in here if r["curve"] == curve)
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1.2, markersize=5, **style)
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.8 * least, 1.1)
        metric = here[0]["metric"]
        axes.set_title(f"{task}, {length} tokens")
        axes.set_xlabel("bytes read / dense")
        axes.set_ylabel(f"{metric} (lower is better)" if metric == "perplexity" else metric)
        if metric == "accuracy":
            axes.set_ylim(-0.03, 1.03)
        made.append(_svg(figure, f"{task}, {length} tokens: {metric} against bytes read"))
    return [_key(look, "dense"), *made]


def bytes_against_length(rows: Sequence[Row]) -> list[str]:
    """Mean bytes fraction over the tasks, one curve a spec, both axes logarithmic."""
    look = _look(list(dict.fromkeys(row["spec"] for row in rows if row["policy"] != "dense")))
    figure, axes = _panel()
    for spec, style in look.items():
        lengths = sorted({row["length"] for row in rows if row["spec"] == spec})
        values = [
            _mean([r["bytes_fraction"] for r in rows if (r["spec"], r["length"]) == (spec, n)])
            for n in lengths
        ]
        axes.plot(lengths, values, linewidth=1.2, markersize=5, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths := sorted({row["length"] for row in rows}), lengths)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("bytes read / dense")
    return [_key(look), _svg(figure, "Bytes read over dense, against context length")]


def budget_by_head(rows: Sequence[Row]) -> list[str]:
    """A heat map for each spec: pages attended by layer and KV head, mean over tasks."""
    return _heat_maps(rows, "pages_by_head", "share of pages")


def rounds_by_head(rows: Sequence[Row]) -> list[str]:
    """A heat map for each spec: rounds of the loop by layer and KV head, mean over tasks."""
    return _heat_maps(rows, "rounds_by_head", "rounds")


def _heat_maps(rows: Sequence[Row], column: str, label: str) -> list[str]:
    made = []
    for spec in dict.fromkeys(row["spec"] for row in rows):
        tables = [row[column] for row in rows if row["spec"] == spec]
        mean = [
            [_mean([table[i][j] for table in tables]) for j in range(len(tables[0][0]))]
            for i in range(len(tables[0]))
        ]
        figure, axes = _panel()
        axes.grid(False)
        image = axes.imshow(mean, aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(spec)
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
        axes.set_xticks(range(len(mean[0])))
        axes.yaxis.get_major_locator().set_params(integer=True)
        peak = max(max(line) for line in mean)
        if len(mean) * len(mean[0]) <= 64:
            for i, line in enumerate(mean):
                for j, value in enumerate(line):
                    shade = "black" if value > 0.6 * peak else "white"
                    axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=shade)
        figure.colorbar(image, ax=axes, label=label)
        made.append(_svg(figure, f"{spec}: {label} by layer and KV head"))
    return made


def coverage(panels: Mapping[str, Sequence[tuple[str, float, float]]]) -> list[str]:
    """Requested against achieved coverage, a panel for each title.

    Args:
        panels: (curve, requested, achieved); those of one curve and request are averaged.
    """
    look = _look(list(dict.fromkeys(p[0] for points in panels.values() for p in points)))
    made = []
    for title, points in panels.items():
        figure, axes = _panel()
        lowest = min(min(asked, got) for _, asked, got in points)
        axes.plot([lowest, 1], [lowest, 1], color="black", linewidth=0.8, linestyle="--")
        for curve, style in look.items():
            asked = sorted({point[1] for point in points if point[0] == curve})
            mine = [(x, _mean([p[2] for p in points if p[:2] == (curve, x)])) for x in asked]
            if mine:
                axes.plot(*zip(*mine, strict=True), linewidth=1.2, markersize=5, **style)
        axes.set_title(title)
        axes.set_xlabel("coverage requested")
        axes.set_ylabel("coverage achieved")
        made.append(_svg(figure, f"{title}: coverage achieved against requested"))
    return [_key(look, "as requested"), *made]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
