"""What a pass over a server shows: throughput, time to the first token, requests held at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from benchmark.memory.traces import Pass
from benchmark.stream_client import Answer, closed_loop

_POLL_SECONDS = 0.5


class Sample(NamedTuple):
    """One round of a pass.

    Attributes:
        running: requests that ran, as the server said from time to time.
    """

    answers: list[Answer]
    running: list[int]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(a.ended for a in self.answers) - min(a.sent for a in self.answers)


def run(url: str, asked: Pass, name: str) -> Sample:
    """One round of ``asked``; ``name`` is part of the requests' identifiers."""

    async def both() -> Sample:
        running: list[int] = []
        polling = asyncio.create_task(_poll(url, running))
        try:
            answers = await closed_loop(url, asked.asks, asked.concurrency, name)
        finally:
            polling.cancel()
        return Sample(answers, running)

    return asyncio.run(both())


async def _poll(url: str, running: list[int]) -> None:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as client:
        while True:
            try:
                async with client.get(url + "/v1/loads?include=core") as response:
                    running.append((await response.json())["loads"][0]["num_running_reqs"])
            except (aiohttp.ClientError, TimeoutError):
                return
            await asyncio.sleep(_POLL_SECONDS)


def decode_rate(answers: Sequence[Answer]) -> float | None:
    """Tokens a second while every request under way has its first token; ``None``: never."""
    waits = sorted(
        (answer.sent, answer.arrivals[0][0] if answer.arrivals else answer.ended)
        for answer in answers
    )
    free: list[tuple[float, float]] = []
    until = waits[0][0]
    for start, stop in [*waits, (max(a.ended for a in answers),) * 2]:
        if start > until:
            free.append((until, start))
        until = max(until, stop)
    tokens, seconds = 0, sum(stop - start for start, stop in free)
    for answer in answers:
        pairs = zip(answer.arrivals, answer.arrivals[1:], strict=False)
        tokens += sum(
            now[1] - before[1]
            for before, now in pairs
            if any(start < now[0] <= stop for start, stop in free)
        )
    return tokens / seconds if seconds > 0 else None


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians over rounds; times to the first token are of all requests of all rounds together.

    Seconds, and requests or tokens a second.
    """
    rates = [rate for sample in samples if (rate := decode_rate(sample.answers)) is not None]
    done = [sum(answer.whole for answer in sample.answers) / sample.seconds for sample in samples]
    firsts = [a.ttft for sample in samples for a in sample.answers if a.ttft is not None]
    running = [count for sample in samples for count in sample.running]
    return {
        "requests": len(samples[0].answers),
        "rounds": len(samples),
        "request_throughput": float(np.median(done)),
        "decode_tok_s": float(np.median(rates)) if rates else None,
        **{f"ttft_p{p}": float(np.percentile(firsts, p)) if firsts else None for p in (50, 99)},
        "running_max": max(running, default=None),
        "running_mean": float(np.mean(running)) if running else None,
        "cached_tokens": _total(samples, "cached_tokens"),
        "retractions": _total(samples, "num_retractions"),
    }


def _total(samples: Sequence[Sample], key: str) -> int:
    return sum(answer.meta.get(key) or 0 for sample in samples for answer in sample.answers)


def equal(answers: Sequence[Answer], wanted: dict[tuple[int, ...], list[int]]) -> bool:
    """Whether every answer is that of ``wanted`` (prompt -> tokens) and none is cut short but
    where its client left; there both may end at another token."""
    return all(_equal(answer, wanted.get(answer.ask.ids, [])) for answer in answers)


def _equal(answer: Answer, wanted: list[int]) -> bool:
    if answer.error or not (answer.whole or answer.left):
        return False
    least = min(answer.ask.new_tokens, answer.ask.leave_after or answer.ask.new_tokens)
    both = min(len(answer.ids), len(wanted))
    return both >= least and answer.ids[:both] == wanted[:both]
