"""One engine in a process of its own, which answers over a socket. Standard library only: it also
runs in the environment of another engine."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """Fewest tokens that any request of the batch has so far, and what its engine tells."""

    tokens: int
    meta: dict[str, Any]


#: Prompts (token ids) and new tokens of each -> progress after every step.
Generate = Callable[[list[list[int]], int], Iterator[Progress]]


def timed(generate: Generate, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Answer a batch, greedily and to the end.

    Returns:
        prefill_s: until every request has its first token; steps_ms: of each decode step from the
        one on after which every request has two tokens; meta: the engine's last.
    """
    begin = time.perf_counter()
    prefill, last, meta = 0.0, (0, begin), {}
    steps: list[float] = []
    for progress in generate(prompts, new_tokens):
        now, meta = time.perf_counter(), progress.meta or meta
        if progress.tokens >= 1 and not prefill:
            prefill = now - begin
        if progress.tokens > last[0]:
            if last[0] >= 2:
                steps.append((now - last[1]) * 1e3 / (progress.tokens - last[0]))
            last = (progress.tokens, now)
    return {"prefill_s": prefill, "steps_ms": steps, "meta": meta}


def serve(start: Callable[[dict[str, Any]], tuple[Generate, Callable[[], None], str]]) -> None:
    """Start the engine of the command line, answer until told to stop.

    Args:
        start: from the engine's settings to its generator, what shuts it down, and its version.
    """
    generate, close, version = start(json.loads(sys.argv[2]))
    with Client(sys.argv[1], family="AF_UNIX") as connection:
        connection.send({"version": version})
        # A parent that is gone ends this process and its children too.
        with contextlib.suppress(EOFError):
            while (asked := connection.recv()) is not None:
                try:
                    connection.send(timed(generate, asked["prompts"], asked["new_tokens"]))
                except Exception as error:
                    connection.send({"error": f"{type(error).__name__}: {error}"})
    close()
