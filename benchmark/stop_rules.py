"""Output error against bytes read: stop rules marginal and change, with and without compensation.

Decode steps of captured contexts through the wrapper; the error of a query head is
|o - o_dense| / |o_dense|, the mean and the 95th percentile are over layers, steps and heads.

python -m benchmark.stop_rules            # results/stop_rules.json and .png
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch

from benchmark.common import RESULTS, save
from sgl_psa.audit.capture import EMBEDDED_MODEL, CapturedModel
from sgl_psa.audit.contexts import make_context
from sgl_psa.audit.replay import Measured, Replay
from sgl_psa.audit.settings import Setting
from sgl_psa.config import PSAConfig

RULES = ("marginal", "change")
DELTAS = (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
#: Shares of the pages at which rules are compared.
AT_PAGES = (0.03, 0.05, 0.1, 0.2)


def point(delta: float, measured: Measured) -> dict[str, float]:
    """One knob's row of the report."""
    error = torch.cat(measured.error)
    return {
        "delta": delta,
        "pages": measured.pages / measured.pages_total,
        "bytes": measured.bytes_read / measured.bytes_dense,
        "error": float(error.mean()),
        "error_p95": float(error.quantile(0.95)),
        "coverage": float(torch.cat(measured.coverage).mean()),
    }


def curves(replay: Replay, scorer: Any) -> dict[str, list[dict[str, float]]]:
    """Curve name -> its points, one a delta."""
    kinds = list(itertools.product(RULES, (False, True)))
    found: dict[str, list[dict[str, float]]] = {}
    for stop, compensate in kinds:
        configs = [
            PSAConfig(stop=stop, delta=d, scorer=scorer, compensate=compensate, min_context=0)  # type: ignore[arg-type]
            for d in DELTAS
        ]
        results = replay.measure([Setting(c, "plain", c.delta) for c in configs])
        name = stop + (" compensated" if compensate else "")
        found[name] = [point(d, r) for d, r in zip(DELTAS, results, strict=True)]
    return found


def at_equal_pages(points: list[dict[str, float]]) -> dict[str, float]:
    """Mean error at given shares of pages, by interpolation of the logarithms."""
    pages = np.log([p["pages"] for p in points])
    errors = np.log([p["error"] for p in points])
    inside = [x for x in AT_PAGES if pages[0] <= np.log(x) <= pages[-1]]
    return {str(x): float(np.exp(np.interp(np.log(x), pages, errors))) for x in inside}


def plot(report: dict[str, Any]) -> None:
    """Write ``results/stop_rules.png``: a row a length, a column a scorer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, scorers = list(report["lengths"]), report["options"]["scorers"].split(",")
    size = (5.5 * len(scorers), 4 * len(lengths))
    figure, grid = pyplot.subplots(len(lengths), len(scorers), figsize=size, squeeze=False)
    for row, tokens in zip(grid, lengths, strict=True):
        for axes, scorer in zip(row, scorers, strict=True):
            for name, points in report["lengths"][tokens][scorer]["curves"].items():
                x, y = ([p[key] for p in points] for key in ("bytes", "error"))
                axes.plot(x, y, "--" if "change" in name else "-", marker="o", label=name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{scorer}, {tokens} tokens")
            axes.set_xlabel("bytes read over those of dense attention")
            axes.set_ylabel("mean output error")
            axes.grid(True, which="both", alpha=0.3)
            axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "stop_rules.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--scorers", default="sketch,two_level")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--page-size", type=int, default=16)
    options = parser.parse_args()
    model = CapturedModel(options.model)
    report: dict[str, Any] = {
        "options": vars(options) | {"model": options.model.rsplit("/", 1)[-1]},
        "lengths": {},
    }
    for tokens in map(int, options.lengths.split(",")):
        contexts = [
            model.layers(
                make_context(model.tokenizer, tokens, options.steps, seed).ids, options.steps
            )
            for seed in range(options.contexts)
        ]
        replay = Replay(contexts, options.page_size)
        rows = report["lengths"][str(tokens)] = {}
        for scorer in options.scorers.split(","):
            found = curves(replay, scorer)
            equal = {name: at_equal_pages(points) for name, points in found.items()}
            rows[scorer] = {"curves": found, "error_at_equal_pages": equal}
            for name, points in found.items():
                default = next(p for p in points if p["delta"] == 0.1)
                shown = " ".join(f"{share}: {error:.4f}" for share, error in equal[name].items())
                print(
                    f"{tokens:6d} {scorer:10s} {name:21s} error at pages {shown} | delta 0.1: "
                    f"bytes {default['bytes']:.3f} error {default['error']:.4f} "
                    f"p95 {default['error_p95']:.3f}",
                    flush=True,
                )
        save("stop_rules", report)
    plot(report)


if __name__ == "__main__":
    main()
