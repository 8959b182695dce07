"""What a KV pool of two tiers costs and gives: whole servers, all-resident against tiered.

    python -m benchmark.memory [--quick] [--only TRACES] [--systems NAMES] [--resume]
    python -m benchmark.memory --device cuda --dtype bfloat16 --model FOLDER --quick --only decode

Servers of the embedded model, or of that in a folder, answer streamed requests over HTTP
(``traces.py``, ``cases.py``):

* ``equal``: concurrent requests that share prefixes in part, some of whose clients leave, while the
  tiered servers retract again and again. Arenas of 100, 50, 25 and 10 % of the KV.
* ``cold``, ``warm``: prompts that share prefixes in part, some of whose clients leave; then the
  same contexts, asked more, from the cache. Arenas, placements, host tiers, with and without
  pipeline.
* ``documents``: long contexts, each asked about three times. An arena of 25 % of the KV against an
  all-resident server with as many device bytes, sketches counted on both sides.
* ``distinct``: the same two servers, prompts that share nothing, long answers.

``outputs_equal_resident``: every answer is token for token that of the all-resident server, as far
as its client stayed. ``decode_tok_s`` counts while every request under way has its first token.
Bytes are those of all rounds. Rows are written after every pass.

On a GPU servers are up one after the other, all run Triton's kernels, and none has a host tier in a
file. Products of other batches may round otherwise there, so answers may differ
(``benchmark.gpu.check_tiers`` asks one at a time).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

import torch

from benchmark.common import write_rows
from benchmark.memory import plot
from benchmark.memory.cases import DEFAULT, QUICK, SEED, Case
from benchmark.memory.report import markdown
from benchmark.memory.rounds import CaseRun, Row
from benchmark.memory.systems import PAGE_SIZE, Model, kv_bytes
from benchmark.memory.traces import Trace, Writer
from sgl_psa.evaluate.cli import EMBEDDED

NAME = "bench_memory"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = {"type": lambda text: text.split(","), "default": None}
    parser.add_argument("--only", help="cases; default: all", **words)
    parser.add_argument("--systems", help="names, separated by ;", type=lambda t: t.split(";"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder; default: embedded")
    parser.add_argument(
        "--dtype", default="float32", help="of model and KV; in bfloat16 the order of chunks shows"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--quick", action="store_true", help="short prompts, few rounds")
    return parser.parse_args(arguments)


def is_of(row: Row, trace: Trace, model: Model, options: argparse.Namespace) -> bool:
    """Whether ``row`` is a finished measurement of ``trace`` under ``options``."""
    asked = (options.device, model.dtype, options.threads)
    return (
        row["trace"] in {one.name for one in trace.passes}
        and (row["device"], row["dtype"], row["threads"]) == asked
        and row["kv_bytes"] == kv_bytes(model, trace.kv_tokens(PAGE_SIZE))
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    path = options.out / f"{NAME}.json"
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "--device cuda: PyTorch finds no CUDA device; leave --device out to run on the CPU"
        )
    kept: list[Row] = json.loads(path.read_text()) if options.resume and path.exists() else []
    missing: list[str] = []
    for case in QUICK if options.quick else DEFAULT:
        if not options.only or case.name in options.only:
            kept = _run(case, options, kept, path, missing)
    write_rows(path, kept)
    table = markdown(kept)
    path.with_suffix(".md").write_text(table)
    picture = plot.residency(path.with_suffix(".png"), kept)
    print(f"{table}\n{path}\n{picture or 'no residency to draw'}")
    unequal = [f"{r['trace']}: {r['system']}" for r in kept if not r["outputs_equal_resident"]]
    for said, names in (("missing", missing), ("answers differ", unequal)):
        if names:
            print(f"!!! {said}: {'; '.join(names)}", flush=True)
    return 1 if missing or unequal else 0


def _run(
    case: Case, options: argparse.Namespace, kept: list[Row], path: Path, missing: list[str]
) -> list[Row]:
    """``kept`` with the rows of ``case`` that it lacks."""
    trace = case.trace(Writer(SEED, options.model))
    passes = {one.name for one in trace.passes}
    model = Model.of(options.model, options.dtype)
    kinds = {"memory"} if options.device == "cuda" else {"memory", "file"}
    names = {system.name for group in case.groups for system in group if system.host in kinds}
    names &= set(options.systems or names)
    mine = [row for row in kept if is_of(row, trace, model, options)]
    have = {n for n in names if {r["trace"] for r in mine if r["system"] == n} == passes}
    if names <= have:
        return kept
    left = names - have
    # The reference runs again: its answers are needed.
    again = left | {case.reference.name}
    others = [row for row in kept if row not in mine or row["system"] not in again]
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        run = CaseRun(case, trace, model, options, Path(folder))
        print(f"{case.name}: {run.kv_tokens} tokens of KV, {trace.concurrency} clients", flush=True)
        try:
            run.run(left, lambda: write_rows(path, [*others, *run.rows]))
        except RuntimeError as error:
            print(f"!!! {error}", flush=True)
    missing += [f"{case.name}: {name}" for name in run.failed]
    return [*others, *run.rows]


if __name__ == "__main__":
    sys.exit(main())
