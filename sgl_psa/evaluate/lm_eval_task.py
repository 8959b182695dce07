"""Our questions as a task of lm-eval: python -m sgl_psa.evaluate.lm_eval_task --out out/lm_eval

Writes ``psa_TASK.jsonl``, one question a line with its whole prompt, and ``psa_TASK.yaml``, which
lm-eval finds by ``--include_path``; both may be copied and edited. Only tasks whose answer is one
line that must match as a whole (the line language of the embedded model) can be written down so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sgl_psa.evaluate.cli import EMBEDDED
from sgl_psa.evaluate.example import Example
from sgl_psa.evaluate.material import RECALL, ContextTooShort, Material
from sgl_psa.evaluate.measurement import build_examples
from sgl_psa.evaluate.tasks import TASKS

#: ``data_files`` is filled in with an absolute path: lm-eval resolves it against its own folder.
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {max_tokens}
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sgl_psa.evaluate.lm_eval_task", description=__doc__
    )
    add = parser.add_argument
    known = [name for name, task in TASKS.items() if RECALL in task.builders]
    add("--task", default="single", help=f"one of {', '.join(known)} that asks for one line")
    add("--length", type=int, default=2048, help="tokens of a prompt, its answer included")
    add("--queries", type=int, default=24)
    add("--seed", type=int, default=0)
    add("--model", default=str(EMBEDDED), help="folder whose tokenizer counts the tokens")
    add("--out", type=Path, default=Path("out/lm_eval"))
    return parser.parse_args(argv)


def documents(
    tokenizer: Any, task: str, length: int, queries: int, seed: int
) -> Iterator[dict[str, Any]]:
    """``prompt``, ``answer`` and ``max_tokens`` of every question.

    Raises:
        ValueError: the task has no questions of one line with an exact answer.
    """
    if task not in TASKS or RECALL not in TASKS[task].builders:
        raise ValueError(f"--task {task!r}: not in the line language of the embedded model")
    material = Material(tokenizer, RECALL)
    for example in build_examples(TASKS[task], task, material, length, queries, seed):
        if not isinstance(example, Example) or any(len(q.turns) > 1 for q in example.queries):
            raise ValueError(f"--task {task}: has no single questions, use single or tracking")
        for query in example.queries:
            (turn,) = query.turns
            yield {
                "prompt": example.context + turn.question,
                "answer": turn.answers[0],
                "max_tokens": turn.max_tokens,
            }


def write(found: Sequence[dict[str, Any]], task: str, folder: Path) -> tuple[Path, Path]:
    """Write data and task; returns the paths of both."""
    folder.mkdir(parents=True, exist_ok=True)
    data, yaml = folder / f"psa_{task}.jsonl", folder / f"psa_{task}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    # One more than the answer and its newline: a server that stops at the limit keeps the newline.
    longest = max(row["max_tokens"] for row in found) + 1
    yaml.write_text(
        _TASK.format(name=f"psa_{task}", data=json.dumps(str(data.resolve())), max_tokens=longest)
    )
    return data, yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Write the task and say how to run it."""
    options = parse(argv)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        asked = (options.task, options.length, options.queries, options.seed)
        data, yaml = write(list(documents(tokenizer, *asked)), options.task, options.out)
    except (ValueError, ContextTooShort) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{data}: {options.queries} questions\nlm_eval --include_path {yaml.parent}", end=" ")
    print(f"--tasks psa_{options.task} ...")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
