"""A server over two tiers on a GPU against the all-resident one: the same greedy tokens.

    python -m benchmark.gpu.check_tiers --model FOLDER
    python -m benchmark.gpu.check_tiers --device cpu --dtype float32 --tokens 900   # without a GPU

Prompts of random tokens, some of which continue others, are asked one at a time, so that every
product has the same shape on all servers; their prefill takes several chunks and reads prefixes of
the cache. Then all at once, whose answers are not compared (a batch of another size may round
otherwise), and the tiers are checked for contradictions. Arenas of 25 and 10 % of the KV; over an
int8 host, which rounds pages, answers of one are those of the other. Prints a line a server and
exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.memory.systems import (
    PAGE_SIZE,
    QUARTER,
    RESIDENT,
    TENTH,
    Model,
    System,
    flags,
    sizes,
)
from benchmark.memory.traces import distinct_pages
from benchmark.server_process import Server
from sgl_psa.evaluate.cli import EMBEDDED

CLIENTS = 4
NEW_TOKENS = 48
INT8 = tuple(
    replace(system, name=f"int8, {system.name}", host_dtype="int8") for system in (QUARTER, TENTH)
)
SYSTEMS = (RESIDENT, QUARTER, TENTH, *INT8)


def prompts(vocabulary: int, tokens: int, seed: int = 1) -> list[list[int]]:
    """``CLIENTS`` prompts of up to ``tokens`` ids; each second one begins as the one before."""
    choose = random.Random(seed)
    made: list[list[int]] = []
    for number in range(CLIENTS):
        begin = made[-1][: tokens // 2 + 5] if number % 2 else []
        length = tokens - choose.randrange(tokens // 8) - len(begin)
        made.append(begin + [choose.randrange(3, vocabulary) for _ in range(length)])
    return made


def ask(server: Server, asked: Sequence[list[int]]) -> list[list[int]]:
    """Greedy answers, one prompt after the other; all are asked at once afterwards, twice.

    Raises:
        AssertionError: a request failed, or the tiers contradict themselves.
    """
    sampling = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    answers = [server.generate(ids, **sampling)["output_ids"] for ids in asked]
    for _ in range(2):
        for answer in server.together(asked, **sampling):
            assert len(answer["output_ids"]) == NEW_TOKENS, answer["meta_info"]
    if server.stats().get("memory") is not None:
        problems = server.memory_problems()
        assert not problems, problems
    server.assert_no_leak()
    return answers


def first_difference(got: list[list[int]], want: list[list[int]]) -> str | None:
    """Where answers differ; ``None`` if nowhere."""
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        for token, pair in enumerate(zip(mine, theirs, strict=True)):
            if pair[0] != pair[1]:
                return f"answer {number} differs from token {token} of {len(theirs)} on"
    return None


def run(
    system: System, model: Model, asked: Sequence[list[int]], device: str, log: Path
) -> tuple[list[list[int]], dict[str, Any] | None]:
    """Answers of a server, and ``memory`` of its statistics."""
    kv_tokens = PAGE_SIZE * (
        distinct_pages(asked, PAGE_SIZE) + CLIENTS * (-(-NEW_TOKENS // PAGE_SIZE) + 1)
    )
    sized = sizes(system, model, kv_tokens, CLIENTS)
    given = flags(system, model, sized, CLIENTS, device, log.parent)
    given[given.index("--psa-min-context") + 1] = "0"
    # As over tiers, so that all servers run the same.
    given += ["--cuda-graph-backend-decode", "disabled"]
    server = Server(system.name, given, log)
    try:
        return ask(server, asked), server.stats().get("memory")
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder; default: embedded")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=6000, help="of the longest prompt")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    options = parser.parse_args()
    model = Model.of(options.model, options.dtype)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    asked = prompts(vocabulary, options.tokens)
    wanted: dict[str, list[list[int]]] = {}  # by the elements of the host tier
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for system in SYSTEMS:
            log = logs / f"check_tiers_{SYSTEMS.index(system)}.log"
            try:
                answers, memory = run(system, model, asked, options.device, log)
                first = system.host_dtype not in wanted
                different = first_difference(answers, wanted.setdefault(system.host_dtype, answers))
                assert different is None, different
                equal = "" if first else "equal, "
                verdict = "ok" if memory is None else f"{memory['loads']} loads, {equal}ok"
            except (AssertionError, OSError, RuntimeError) as error:
                failed += 1
                verdict = f"FAILED: {type(error).__name__}: {error}"
            print(f"tiers {system.name:16} {verdict}", flush=True)
            if not wanted:
                break
    print(f"{failed} failed" if failed else "all passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
