"""Decode and prefill of whole engines on CPU, side by side in one run.

    python -m benchmark.serving [--quick | --full] [--vllm-python PYTHON]

Systems: SGLang's ``torch_native`` backend, ours dense and as PSA by default, vLLM's CPU build (in
an environment of its own: ``make vllm-env``). Models: the embedded one, and a Llama of random
weights with 224 M parameters (``random_llama.py``), of which only time and bytes mean something.
Requests are random ids, greedy, of equal length; a batch is sent at once. ``decode_ms_median`` is
the wall time of a step once every request has two tokens, ``prefill_s`` that until every request
has one. Systems alternate; those that do not fit into memory side by side are up one at a time.
Rows are written after every answer; ``--resume`` keeps the finished cases of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark.common import integers, write_rows
from benchmark.serving import plot
from benchmark.serving.cases import DEFAULT, FULL, QUICK, RANDOM, RECALL, Case, model
from benchmark.serving.rounds import Rounds, rows
from benchmark.serving.systems import SYSTEMS, System, vllm_missing

Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="default: all", type=lambda text: text.split(","))
    parser.add_argument("--contexts", help="default: all", type=integers)
    parser.add_argument("--batches", help="default: all", type=integers)
    parser.add_argument("--systems", help="default: all", type=lambda text: text.split(","))
    parser.add_argument("--threads", help="of each engine, in turn", type=integers, default=[1])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--vllm-python", help="of the environment that `make vllm-env` makes")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quick", action="store_true", help="embedded model, short contexts")
    parser.add_argument(
        "--full", action="store_true", help="also 8k x 4 and 32k of the random model: many hours"
    )
    options = parser.parse_args(arguments)
    for name, known in (("models", (RECALL, RANDOM)), ("systems", [s.name for s in SYSTEMS])):
        unknown = [x for x in getattr(options, name) or () if x not in known]
        if unknown:
            parser.error(f"--{name}: no {', '.join(unknown)}; there are {', '.join(known)}")
    if not chosen(options):
        cases = ", ".join(f"{c.model} {c.context} x {c.batch}" for c in cases_of(options))
        parser.error(f"--models, --contexts and --batches leave nothing of {cases}")
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All that --quick, --full or neither stands for."""
    return list(QUICK if options.quick else FULL if options.full else DEFAULT)


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the options leave."""
    return [
        case
        for case in cases_of(options)
        if (not options.models or case.model in options.models)
        and (not options.contexts or case.context in options.contexts)
        and (not options.batches or case.batch in options.batches)
    ]


def taking_part(options: argparse.Namespace) -> list[System]:
    """The systems that can run; says loudly which cannot."""
    systems = [s for s in SYSTEMS if not options.systems or s.name in options.systems]
    if any(s.is_vllm for s in systems) and (why := vllm_missing(options.vllm_python)):
        print(f"!!! vllm_cpu LEFT OUT: {why}", flush=True)
        systems = [s for s in systems if not s.is_vllm]
    return systems


def is_of(row: Row, case: Case, threads: int) -> bool:
    """Whether ``row`` is a measurement of ``case``."""
    keys = (row["model"], row["context"], row["batch"], row["threads"])
    return keys == (case.model, case.context, case.batch, threads)


def markdown(found: list[Row]) -> str:
    """Milliseconds a decode step and, in brackets, seconds of prefill; one line a system."""
    keys = ("model", "threads", "context", "batch")
    columns = list(dict.fromkeys(tuple(r[key] for key in keys) for r in found))
    heads = [f"{m}, {c // 1024}k x {b}, {t} thread(s)" for m, t, c, b in columns]
    lines = [f"| ms a step (prefill, s) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    cells = {(r["system"], *(r[key] for key in keys)): r for r in found}
    for system in dict.fromkeys(r["system"] for r in found):
        line = [cells.get((system, *column)) for column in columns]
        texts = [f"{r['decode_ms_median']:.1f} ({r['prefill_s']:.2f})" if r else "" for r in line]
        lines.append(f"| {system} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Engines are closed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    path = options.out / "bench_serving.json"
    done: list[Row] = json.loads(path.read_text()) if options.resume and path.exists() else []
    systems = taking_part(options)
    with tempfile.TemporaryDirectory(prefix="bench-serving-cache-") as cache:
        # What an interrupted run left half compiled would keep vLLM from starting.
        os.environ["VLLM_CACHE_ROOT"] = cache
        for threads in options.threads:
            done = _of_threads(options, systems, threads, done, path)
    write_rows(path, done)
    table = markdown(done)
    (options.out / "bench_serving.md").write_text(table)
    print(f"{table}\n{path}")
    if done:
        print(plot.plot(done, path.with_suffix(".png")))


def _of_threads(
    options: argparse.Namespace, systems: list[System], threads: int, done: list[Row], path: Path
) -> list[Row]:
    """``done`` and the rows of all cases that it lacks."""
    names = {system.name for system in systems}
    left = [
        case
        for case in chosen(options)
        if names - {row["system"] for row in done if is_of(row, case, threads)}
    ]
    for name in dict.fromkeys(case.model for case in left):
        mine = [case for case in left if case.model == name]
        kept = [row for row in done if not any(is_of(row, case, threads) for case in mine)]
        run = Rounds(
            model(name, options.out),
            systems,
            vllm_python=options.vllm_python,
            threads=threads,
            new_tokens=options.new_tokens,
            report=lambda run, kept=kept: write_rows(path, [*kept, *rows(run)]),
        )
        run.run(mine)
        done = [*kept, *rows(run)]
        if run.failed:
            print(f"!!! missing for {name}: {', '.join(run.failed)}", flush=True)
    return done


if __name__ == "__main__":
    main()
