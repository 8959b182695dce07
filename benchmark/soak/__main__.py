"""Random load on a tiered server; every answer is compared with that of an all-resident one.

    python -m benchmark.soak --minutes 30 [--seed N] [--hosts memory,file]

First an all-resident server answers every prompt, by either rule. Then a tiered one, with a host
tier too small for the load and an arena of a fifth of it, answers them in any order and number,
while clients disconnect and abort, caches are flushed and requests are retracted; half of the time
each with its host tier in memory and in a file. Between two phases, when nothing runs, the books
are checked: the tiers' (``GET /psa/memory/check``), SGLang's own, and that a flush leaves nothing
held. Ends with 1 on any leak or wrong answer.

KV is float32 and the rule careful, so that another order of summation changes no greedy token. What
retraction may change is told in :mod:`benchmark.soak.load`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from benchmark.common import write_rows
from benchmark.memory.systems import PAGE_SIZE, Model
from benchmark.server_process import Server
from benchmark.soak.load import NEW_TOKENS, RULES, Tally, Wanted, phase, prompts
from benchmark.stream_client import Ask, closed_loop

HOST_TOKENS, ARENA = 12288, 0.2
CLIENTS = 8
_PHASE_SECONDS = (15.0, 60.0)
_FLUSH_AFTER = 0.5
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    # And every so many steps, whether there is room or not.
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "50",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument(
        "--hosts", default=["memory", "file"], type=lambda text: text.split(","), help="in turn"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args(arguments)


def flags(model: Model, device: str, extra: dict[str, Any]) -> list[str]:
    """Of ``sglang.launch_server``."""
    made = {
        "model-path": model.folder,
        "device": device,
        "dtype": model.dtype,
        "page-size": PAGE_SIZE,
        "context-length": 8192,
        "chunked-prefill-size": 512,
        "mem-fraction-static": 0.3,
        "attention-backend": "psa",
        "psa-min-context": 256,
        "psa-delta": 0.001,
        **extra,
    }
    return [part for name, value in made.items() for part in (f"--{name}", str(value))]


def tiered(model: Model, host: str, folder: Path) -> dict[str, Any]:
    """Flags of a server whose host tier is too small for the load."""
    host_bytes = (HOST_TOKENS // PAGE_SIZE + 1) * model.page_bytes
    made: dict[str, Any] = {
        "psa-device-pool-bytes": int(ARENA * host_bytes),
        "psa-host-pool-bytes": host_bytes,
        "max-running-requests": 2 * CLIENTS,
        # Promises little room to answers, so that some are retracted for lack of it.
        "schedule-conservativeness": 0.05,
    }
    return made | ({"psa-host-path": folder} if host == "file" else {})


def right_answers(server: Server, asked: list[tuple[int, ...]]) -> Wanted:
    """Of every prompt, by every rule.

    Raises:
        RuntimeError: an answer is missing.
    """
    asks = [Ask(ids, NEW_TOKENS, rule) for rule in RULES for ids in asked]
    answers = asyncio.run(closed_loop(server.url, asks, CLIENTS, "right"))
    missing = [answer.error or "cut short" for answer in answers if not answer.whole]
    if missing:
        raise RuntimeError(f"the all-resident server: {missing[0]}\n{server.tail()}")
    return {(answer.ask.ids, answer.ask.rule): answer.ids for answer in answers}


def check(server: Server, flush: bool, tally: Tally) -> None:
    """The books of an idle server."""
    tally.checks += 1
    try:
        for problem in server.memory_problems():
            tally.problem(f"/psa/memory/check: {problem}")
        if flush:
            server.flush()
            server.wait_idle()
            if held := server.load()["num_used_tokens"]:
                tally.problem(f"{held} tokens are held after a flush")
    except (requests.RequestException, AssertionError, KeyError) as error:
        tally.problem(f"{type(error).__name__}: {error}")
    for mark in server.marks():
        tally.problem(f"the log says: {mark}")


def soak(server: Server, wanted: Wanted, seed: str, seconds: float) -> Tally:
    """Phases of load and checks, until the time is up or something is wrong."""
    rng, tally = random.Random(seed), Tally()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end and not tally.problems:
        length = min(rng.uniform(*_PHASE_SECONDS), max(1.0, end - time.monotonic()))
        asyncio.run(phase(server.url, f"{seed}-{number}", rng, wanted, length, tally))
        check(server, rng.random() < _FLUSH_AFTER, tally)
        number += 1
        print(f"  phase {number}: {tally.asked} asked, {tally.whole} whole", flush=True)
    return tally


def resident_bytes(server: Server) -> int:
    """Memory of the server's processes."""
    return sum(process.memory_info().rss for process in server.family())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = Model.embedded("float32")
    asked = prompts(options.seed, options.prompts)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        room = len(RULES) * sum(len(ids) + NEW_TOKENS for ids in asked) + 1024
        resident = flags(model, options.device, {"max-total-tokens": room // PAGE_SIZE * PAGE_SIZE})
        server = Server("resident", resident, folder / "resident.log")
        try:
            wanted = right_answers(server, asked)
        finally:
            server.stop()
        print(f"{len(wanted)} answers of the all-resident server", flush=True)
        for host in options.hosts:
            extra = tiered(model, host, folder)
            server = Server(
                host, flags(model, options.device, extra), folder / f"{host}.log", CHECKS
            )
            try:
                before = resident_bytes(server)
                share = 60 * options.minutes / len(options.hosts)
                tally = soak(server, wanted, f"{options.seed}-{host}", share)
                if tally.problems:
                    print(server.tail(100), flush=True)
                rows.append(summary(host, server, tally, before))
            finally:
                server.stop()
            print(json.dumps(rows[-1], indent=1), flush=True)
    write_rows(options.out / "soak.json", rows)
    bad = sum(len(row["problems"]) for row in rows)
    print(f"soak of {options.minutes:g} minutes, seed {options.seed}: {bad} problem(s)")
    return 1 if bad else 0


def summary(host: str, server: Server, tally: Tally, before: int) -> dict[str, Any]:
    """What one server did."""
    memory: dict[str, Any] = {}
    grown = None
    try:
        memory = server.stats()["memory"]
        grown = resident_bytes(server) - before
    except (requests.RequestException, AssertionError, KeyError):
        pass
    shown = ("hit_rate", "hits", "loads", "bytes_loaded", "bytes_in_vain", "evictions", "recycled")
    return {
        "host": host,
        **{key: value for key, value in vars(tally).items() if key != "problems"},
        **{key: memory.get(key) for key in shown},
        "process_bytes_grown": grown,
        "problems": tally.problems,
    }


if __name__ == "__main__":
    sys.exit(main())
