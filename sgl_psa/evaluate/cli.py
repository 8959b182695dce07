"""The command line of ``python -m sgl_psa.evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sgl_psa
from sgl_psa.config import ConfigError
from sgl_psa.evaluate import policy_spec, report, server
from sgl_psa.evaluate.in_process import InProcess, load_model
from sgl_psa.evaluate.kept import KeptRuns
from sgl_psa.evaluate.material import PLAIN, RECALL, STYLES, ContextTooShort, Material
from sgl_psa.evaluate.measurement import Runner
from sgl_psa.evaluate.policy_spec import PolicySpec
from sgl_psa.evaluate.results import Results
from sgl_psa.evaluate.tasks import TASKS

EMBEDDED = Path(sgl_psa.__file__).parent / "assets" / "recall"
QUICK = {"lengths": "2048", "queries": 10}
FULL = {"lengths": "8192", "queries": 200}


def parser() -> argparse.ArgumentParser:
    """Every option."""
    made = argparse.ArgumentParser(
        prog="python -m sgl_psa.evaluate",
        description="Accuracy against bytes read, policy by policy.",
        epilog="tasks: " + "; ".join(f"{name}: {task.summary}" for name, task in TASKS.items()),
    )
    add = made.add_argument
    add("--model", help="folder or hub name; default: the embedded model")
    add("--server", metavar="URL", help="ask this running server instead of loading the model")
    add("--lengths", help=f"tokens of a prompt, comma-separated (default {FULL['lengths']})")
    add("--tasks", help="comma-separated; default: all that the style has")
    add("--policies", help="comma-separated specs such as psa:marginal:0.1,topk:box:64,window:64")
    add("--queries", type=int, help=f"questions a task (default {FULL['queries']})")
    add("--seed", type=int, default=0)
    add("--style", choices=STYLES, help="prompts: recall is the embedded model's own language")
    add("--no-chat", action="store_true", help="plain prompts without the chat template")
    add("--quick", action="store_true", help="short contexts, few questions, one knob a policy")
    add("--dtype", default="auto", help="of model and KV cache; default: the checkpoint's")
    add("--device", default="cpu")
    add("--batch", type=int, default=64, help="rows decoded together (in process)")
    add("--parallel", type=int, default=4, help="requests under way (server)")
    add("--out", type=Path, default=Path("out"), help="folder of eval.json and report.html")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing in OUT/eval.json, then write OUT/report.html."""
    options = parser().parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        _run(options)
    except (ConfigError, ContextTooShort, ValueError, server.ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    results = Results(options.out / "eval.json")
    if options.queries < 1:
        raise ValueError(f"--queries {options.queries}: at least 1 is needed")
    lengths = [int(text) for text in options.lengths.split(",")]
    specs = _specs(options)
    runner, tokenizer, style = _runner(options)
    tasks = _tasks(options, style)
    dropped = results.drop_outdated(runner.identity["model"], runner.identity["fingerprint"])
    if dropped:
        print(f"{dropped} rows of another content of {runner.identity['model']} are forgotten")
    runs = KeptRuns(
        runner,
        results,
        Material(tokenizer, style),
        queries=options.queries,
        seed=options.seed,
    )
    work = runs.missing(tasks, lengths, specs)
    with tqdm(total=sum(len(some) for *_, some in work) * options.queries, unit="query") as bar:
        for task, length, some in work:
            bar.set_description(f"{task} {length}")
            runs.measure((task, length, some), bar.update)
    page = report.write(results.rows, options.out)
    print(f"{results.path}: {len(results.rows)} rows; {page}")


def _specs(options: argparse.Namespace) -> list[PolicySpec]:
    base = server.server_config(options.server.rstrip("/")) if options.server else None
    texts = options.policies.split(",") if options.policies else None
    return policy_spec.parse_all(texts or policy_spec.default_specs(options.quick), base)


def _runner(options: argparse.Namespace) -> tuple[Runner, Any, str]:
    """The runner, the tokenizer and the prompt style."""
    name = options.model
    if name is None:
        name = server.model_path(options.server) if options.server else str(EMBEDDED)
    embedded = Path(name).resolve() == EMBEDDED.resolve()
    style = options.style or (RECALL if embedded else PLAIN)
    label = "embedded" if embedded else name
    if options.server:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        chat = _chat(options, tokenizer, style)
        made: Runner = server.Server(
            options.server, tokenizer, name=label, chat=chat, parallel=options.parallel
        )
        return made, tokenizer, style
    model, tokenizer = load_model(name, options.dtype, options.device)
    chat = _chat(options, tokenizer, style)
    made = InProcess(
        model, tokenizer, name=label, folder=Path(name), chat=chat, batch=options.batch
    )
    return made, tokenizer, style


def _chat(options: argparse.Namespace, tokenizer: Any, style: str) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    return style == PLAIN and bool(template) and not options.no_chat


def _tasks(options: argparse.Namespace, style: str) -> list[str]:
    """The tasks asked for.

    Raises:
        ValueError: one does not exist, or not in this style.
    """
    if not options.tasks:
        left = [name for name, task in TASKS.items() if style not in task.builders]
        if left:
            print(f"not in the {style} style, left out: {', '.join(left)}")
        return [name for name in TASKS if name not in left]
    asked = options.tasks.split(",")
    for name in asked:
        if name not in TASKS:
            raise ValueError(f"--tasks {name!r}: known are {', '.join(TASKS)}")
        if style not in TASKS[name].builders:
            raise ValueError(f"--tasks {name}: not in the {style} style, use --style plain")
    return asked
