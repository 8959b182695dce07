"""Requested against achieved coverage on a model's own queries and keys:
python -m sgl_psa.audit --out out

Contexts of filler text and set lines are prefilled densely; the last positions are decoded again
with the true tokens, layer by layer, under every stop rule and mode, and every row is audited.
Writes ``audit.json`` (a list of rows, see :func:`sgl_psa.audit.report.row`) and ``audit.png``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sgl_psa.audit import report
from sgl_psa.audit.capture import EMBEDDED_MODEL, CapturedModel
from sgl_psa.audit.contexts import make_context
from sgl_psa.audit.replay import Measured, Replay
from sgl_psa.audit.settings import settings
from sgl_psa.scorers import SCORERS


def audit(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every scorer and setting at every length."""
    model = CapturedModel(arguments.model)
    tables = {scorer: settings(scorer) for scorer in arguments.scorers}
    found: dict[tuple[str, int], dict[int, Measured]] = {}
    for length in arguments.lengths:
        start = time.monotonic()
        contexts = [
            model.layers(
                make_context(model.tokenizer, length, arguments.steps, seed).ids, arguments.steps
            )
            for seed in range(arguments.seed, arguments.seed + arguments.contexts)
        ]
        replay = Replay(contexts, arguments.page_size)
        print(f"{length} tokens: captured, {time.monotonic() - start:.0f} s", flush=True)
        for scorer, table in tables.items():
            start = time.monotonic()
            for i, measured in enumerate(replay.measure(table)):
                found.setdefault((scorer, i), {})[length] = measured
            print(f"{length} tokens: {scorer}, {time.monotonic() - start:.0f} s", flush=True)
    return [report.row(tables[scorer][i], measured) for (scorer, i), measured in found.items()]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sgl_psa.audit", description=__doc__)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="Hugging Face model folder")
    parser.add_argument("--lengths", default="2048,4096,8192", help="context tokens")
    parser.add_argument("--contexts", type=int, default=4, help="contexts of each length")
    parser.add_argument("--steps", type=int, default=24, help="decode positions of each context")
    parser.add_argument("--scorers", default="two_level,sketch,hybrid", help=", ".join(SCORERS))
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the first context")
    parser.add_argument("--quick", action="store_true", help="two lengths, less of everything")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.lengths, arguments.contexts, arguments.steps = "2048,4096", 1, 12
    arguments.lengths = [int(x) for x in arguments.lengths.split(",")]
    arguments.scorers = arguments.scorers.split(",")
    unknown = [name for name in arguments.scorers if name not in SCORERS]
    if unknown:
        parser.error(f"--scorers: unknown {unknown}; choose from {', '.join(SCORERS)}")
    return arguments


def main() -> None:
    arguments = parse()
    rows = audit(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "audit.json").write_text(json.dumps(rows, indent=1) + "\n")
    report.plot(rows, arguments.out / "audit.png")
    print(report.table(rows))


if __name__ == "__main__":
    main()
