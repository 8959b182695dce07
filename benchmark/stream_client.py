"""Greedy answers streamed from a server by many clients at once, and when their tokens came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

#: A server that says nothing for so long has failed; prompts may wait long for their turn.
SILENCE_SECONDS = 600.0
DISCONNECT, ABORT = "disconnect", "abort"


@dataclass(frozen=True)
class Ask:
    """A prompt and what is wanted of it.

    Attributes:
        ids: of the prompt.
        rule: PSA settings of this request.
        leave_after: tokens after which the client gives up; ``None``: never.
        leave_by: ``disconnect`` closes the connection, ``abort`` asks for ``/abort_request``.
    """

    ids: tuple[int, ...]
    new_tokens: int
    rule: tuple[tuple[str, Any], ...] = ()
    leave_after: int | None = None
    leave_by: str = DISCONNECT

    def body(self, rid: str) -> dict[str, Any]:
        """Of ``POST /generate``; the answer has ``new_tokens`` tokens, end of text or not."""
        sampling = {"temperature": 0, "max_new_tokens": self.new_tokens, "ignore_eos": True}
        if self.rule:
            sampling["custom_params"] = dict(self.rule)
        return {
            "rid": rid,
            "input_ids": list(self.ids),
            "stream": True,
            "sampling_params": sampling,
        }


@dataclass
class Answer:
    """What came back.

    Attributes:
        sent: when the request was sent, seconds of ``time.perf_counter``.
        arrivals: of each event: when it came, and tokens so far.
        ended: when the last event came or the client left.
        left: the client gave up.
        error: what the server said instead of an answer, or how the connection broke.
    """

    ask: Ask
    sent: float
    ids: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    left: bool = False
    error: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """All tokens came."""
        return not self.error and len(self.ids) == self.ask.new_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.arrivals[0][0] - self.sent if self.arrivals else None


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Connections for any number of requests at once; one for each, so that leaving ends it."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    # One event line holds all tokens so far.
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=2**22
    ) as made:
        yield made


async def stream(client: aiohttp.ClientSession, url: str, ask: Ask, rid: str) -> Answer:
    """Ask, and follow the answer to its end or to where the client leaves; never raises for what
    the server does: see :attr:`Answer.error`."""
    answer = Answer(ask, time.perf_counter())
    try:
        async with client.post(url + "/generate", json=ask.body(rid)) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:500]}"
            elif ask.leave_after == 0 and ask.leave_by == ABORT:
                answer.left = True
                await abort(client, url, rid)
                await _follow(response, answer)
            elif ask.leave_after != 0:
                await _follow(response, answer, client, url, rid)
            else:
                answer.left = True
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    return answer


async def _follow(
    response: aiohttp.ClientResponse,
    answer: Answer,
    client: aiohttp.ClientSession | None = None,
    url: str = "",
    rid: str = "",
) -> None:
    """Read events into ``answer``; leaves by the ask's terms while there is a ``client``."""
    async for line in response.content:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[5:])
        if "error" in event:
            answer.error = str(event["error"])[:500]
            return
        ids, answer.meta = event["output_ids"], event["meta_info"]
        if len(ids) > len(answer.ids):
            answer.ids = ids
            answer.arrivals.append((time.perf_counter(), len(ids)))
        after = answer.ask.leave_after
        if client is not None and after is not None and len(ids) >= after and not answer.left:
            answer.left = True
            if answer.ask.leave_by == DISCONNECT:
                response.close()
                return
            await abort(client, url, rid)


async def abort(client: aiohttp.ClientSession, url: str, rid: str) -> None:
    """``POST /abort_request``."""
    async with client.post(url + "/abort_request", json={"rid": rid}) as response:
        response.raise_for_status()


async def closed_loop(url: str, asks: Sequence[Ask], concurrency: int, name: str) -> list[Answer]:
    """Answers in the order of ``asks``; ``concurrency`` clients each send their next request when
    the last one is done."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(asks))

    async with session() as client:

        async def one() -> None:
            for number, ask in waiting:
                # An abort ends every request whose name begins with its own.
                answers[number] = await stream(client, url, ask, f"{name}-{number:06}")

        await asyncio.gather(*(one() for _ in range(concurrency)))
    return [answers[number] for number in range(len(asks))]
