"""Exact match of an exported model folder:
python -m benchmark.recall_model.evaluate --model DIR --lengths 1024,2048,4096,8192 --queries 200

An answer counts when every token is the arg max given the tokens before it, which is the same
as greedy decoding writing it exactly.  Words: `in_list` was used in training, `held_out` never.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from .prepare import Data, prepare
from .tasks import TASKS, Context, ContextMaker, Task

Cell = dict[str, Any]


class Scorer:
    """Runs the exported model; ids never leave one row at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = self.model.to(dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def predictions(self, ids: list[int], places: list[int]) -> list[int]:
        """The arg max token after each of the places."""
        hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0, places]
        return self.model.lm_head(hidden).argmax(-1).tolist()

    @torch.no_grad()
    def perplexity(self, stream: np.ndarray, length: int, windows: int) -> float:
        losses = []
        for i in range(min(windows, (len(stream) - 1) // length)):
            piece = torch.tensor(stream[i * length : (i + 1) * length].astype(np.int64))[None]
            logits = self.model(piece).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, piece[0, 1:]).item())
        return math.exp(sum(losses) / len(losses))

    def right(self, context: Context) -> list[bool]:
        """For each question: is the whole answer right."""
        spans = [range(q.start, q.stop) for q in context.questions]
        places = [p - 1 for span in spans for p in span]
        found = iter(self.predictions(context.ids, places))
        return [all([next(found) == context.ids[p] for p in span]) for span in spans]

    def survives_text(self, context: Context) -> bool:
        """Does the context, decoded to text and tokenised again, give the same ids."""
        text = self.tokenizer.decode(context.ids[1:])
        return self.tokenizer(text).input_ids == context.ids


def measure(
    scorer: Scorer, maker: ContextMaker, task: Task, length: int, queries: int, seed: int
) -> Cell:
    """Exact match of one cell, by hops for chains."""
    results: list[tuple[bool, int]] = []
    contexts = same = 0
    while len(results) < queries:
        context = maker.make(task, length, seed * 100_003 + contexts)
        right = scorer.right(context)
        results += [(r, q.hops) for r, q in zip(right, context.questions, strict=True)]
        same += scorer.survives_text(context)
        contexts += 1
    cell: Cell = {
        "n": len(results),
        "exact_match": round(sum(r for r, _ in results) / len(results), 4),
        "contexts": contexts,
        "text_round_trip": round(same / contexts, 3),
    }
    hops = sorted({h for _, h in results})
    if hops != [0]:
        by_hops = {h: [r for r, other in results if other == h] for h in hops}
        cell["by_hops"] = {h: [round(sum(v) / len(v), 3), len(v)] for h, v in by_hops.items()}
    return cell


def evaluate(scorer: Scorer, data: Data, arguments: argparse.Namespace) -> None:
    """Measure every cell and write the report as it grows."""
    words = {"in_list": data.lexicon.known, "held_out": data.lexicon.held_out}
    report: dict[str, Any] = {
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "cells": {},
        "separator": arguments.separator,
        "text_perplexity": {},
    }
    for length in arguments.lengths:
        for source in arguments.words:
            maker = ContextMaker(data, words[source], arguments.separator)
            for name in arguments.tasks:
                if arguments.separator and TASKS[name].chain:
                    continue
                start = time.monotonic()
                cell = measure(
                    scorer, maker, TASKS[name], length, arguments.queries, arguments.seed
                )
                report["cells"][f"{name}/{length}/{source}"] = cell
                print(
                    f"{name}/{length}/{source}: {cell} {time.monotonic() - start:.0f} s", flush=True
                )
                write(report, arguments.out)
        if arguments.windows:
            report["text_perplexity"][str(length)] = round(
                scorer.perplexity(data.validation, length, arguments.windows), 2
            )
            write(report, arguments.out)


def write(report: dict[str, Any], out: Path | None) -> None:
    """Keep the JSON file complete after every cell."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match of an exported model folder")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="data folder of the training run, to save time")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--words", default="in_list,held_out")
    parser.add_argument("--separator", default="", help="between key and value: ':' or ' ='")
    parser.add_argument("--queries", type=int, default=200, help="least number for each cell")
    parser.add_argument("--windows", type=int, default=8, help="text windows for perplexity")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.lengths = [int(x) for x in arguments.lengths.split(",")]
    arguments.tasks, arguments.words = arguments.tasks.split(","), arguments.words.split(",")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = prepare(arguments.data or Path(scratch), arguments.model / "tokenizer.json")
        if (
            data.tokenizer.to_str()
            != Tokenizer.from_file(str(arguments.model / "tokenizer.json")).to_str()
        ):
            raise SystemExit(f"{arguments.data} belongs to another tokenizer")
        evaluate(Scorer(arguments.model, getattr(torch, arguments.dtype)), data, arguments)


if __name__ == "__main__":
    main()
