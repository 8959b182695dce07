"""Random load from a seed: arrivals in bursts, shared prefixes, clients that leave, flushes.

Half of the requests attend to everything, the others sparsely. What a retracted request decoded is
prefilled again, densely, and so is its next token; a sparse one may then choose another token where
two are about as likely. So such a request counts as ``resumed_otherwise`` if it differs; all others
must give the tokens of the all-resident server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.memory.measure import equal
from benchmark.memory.traces import Writer
from benchmark.stream_client import ABORT, DISCONNECT, Answer, Ask, session, stream

#: Longest answer; each request asks for a part of it.
NEW_TOKENS = 192
PROMPT_TOKENS = (300, 3000)
_PROMPTS_A_DOCUMENT = 6
_STAY, _FLUSH = 0.7, 0.02
#: Mean seconds between two arrivals, drawn anew every few arrivals: lulls and bursts.
_GAPS = (0.02, 0.1, 0.4, 1.0)
_MOST_OPEN = 24
#: Of requests: attend to every page, or as the server does.
EXACT, SPARSE = (("psa_delta", 0.0),), ()
RULES = (EXACT, SPARSE)

Rule = tuple[tuple[str, Any], ...]
#: (prompt, rule) -> tokens.
Wanted = dict[tuple[tuple[int, ...], Rule], list[int]]
_SHOWN = 20


def prompts(seed: int, count: int) -> list[tuple[int, ...]]:
    """Prompts whose documents are shared by several: a beginning of any length of a document,
    then a document of their own, in ``PROMPT_TOKENS`` together."""
    rng, writer = random.Random(seed), Writer(seed)
    made = list[tuple[int, ...]]()
    while len(made) < count:
        shared = writer.prompt.context_ids(writer.example(PROMPT_TOKENS[1]))
        for _ in range(min(_PROMPTS_A_DOCUMENT, count - len(made))):
            total = rng.randint(*PROMPT_TOKENS)
            kept = rng.randint(0, min(len(shared), total - 250))
            own = writer.example(total - kept)
            question = writer.prompt.turn_ids(rng.choice(own.queries).turns[0])
            ids = shared[:kept] + writer.prompt.encode(own.context) + question
            made.append(tuple(ids[-PROMPT_TOKENS[1] :]))
    return made


@dataclass
class Tally:
    """What happened so far.

    Attributes:
        resumed_otherwise: sparse answers that were, or may have been, retracted, and differ.
        problems: wrong or missing answers, leaks, inconsistencies; none in a good run.
    """

    asked: int = 0
    whole: int = 0
    left: int = 0
    aborted: int = 0
    refused_flushes: int = 0
    flushes: int = 0
    retractions: int = 0
    resumed_otherwise: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    checks: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Keep and print it; of very many, the first."""
        if len(self.problems) < _SHOWN:
            print(f"!!! {text}", flush=True)
        self.problems.append(text)

    def add(self, answer: Answer, wanted: Sequence[int]) -> None:
        """Count an answer and compare it."""
        self.asked += 1
        self.whole += answer.whole
        self.left += answer.left and answer.ask.leave_by == DISCONNECT
        self.aborted += answer.left and answer.ask.leave_by == ABORT
        self.tokens += len(answer.ids)
        self.retractions += answer.meta.get("num_retractions") or 0
        self.cached_tokens += answer.meta.get("cached_tokens") or 0
        if _right(answer, wanted):
            return
        if _may_differ(answer) and answer.ids[:1] == list(wanted[: len(answer.ids[:1])]):
            self.resumed_otherwise += 1
        else:
            pairs = enumerate(zip(answer.ids, wanted, strict=False))
            same = next((i for i, (got, want) in pairs if got != want), len(answer.ids))
            self.problem(
                f"wrong answer to a prompt of {len(answer.ask.ids)} tokens: {same} of "
                f"{answer.ask.new_tokens} tokens are right; {answer.error or 'no error'}; rule "
                f"{dict(answer.ask.rule)}, {answer.meta.get('num_retractions')} retractions, "
                f"ended by {answer.meta.get('finish_reason')}"
            )


def _may_differ(answer: Answer) -> bool:
    """Whether it is as long as it should be, sparse, and not known to have run without break."""
    unbroken = answer.meta.get("num_retractions") == 0
    ended = answer.whole or answer.left
    return answer.ask.rule == SPARSE and ended and not answer.error and not unbroken


def _right(answer: Answer, wanted: Sequence[int]) -> bool:
    if answer.left:
        return list(wanted[: len(answer.ids)]) == answer.ids
    return equal([answer], {answer.ask.ids: list(wanted[: answer.ask.new_tokens])})


def ask(rng: random.Random, known: Sequence[tuple[int, ...]]) -> Ask:
    """One request: some prompts come often, some clients leave."""
    # The square makes the first prompts the most frequent ones.
    ids = known[int(len(known) * rng.random() ** 2)]
    new, rule = rng.randint(1, NEW_TOKENS), rng.choice(RULES)
    if rng.random() < _STAY:
        return Ask(ids, new, rule)
    after = rng.choice((0, rng.randint(0, new)))
    return Ask(ids, new, rule, leave_after=after, leave_by=rng.choice((DISCONNECT, ABORT)))


async def phase(
    url: str,
    name: str,
    rng: random.Random,
    wanted: Wanted,
    seconds: float,
    tally: Tally,
) -> None:
    """Load for so long, and until the last answer has come."""
    known = list(dict.fromkeys(ids for ids, _ in wanted))
    end = time.monotonic() + seconds
    open_ones: set[asyncio.Task[None]] = set()
    async with session() as client:

        async def one(number: int) -> None:
            asked = ask(rng, known)
            # An abort ends every request whose name begins with its own.
            answer = await stream(client, url, asked, f"{name}-{number:06}")
            tally.add(answer, wanted[asked.ids, asked.rule])

        number, gap = 0, _GAPS[0]
        while time.monotonic() < end:
            if number % 8 == 0:
                gap = rng.choice(_GAPS)
            if rng.random() < _FLUSH:
                await _flush(client, url, tally)
            if len(open_ones) < _MOST_OPEN:
                task = asyncio.create_task(one(number))
                open_ones.add(task)
                task.add_done_callback(open_ones.discard)
                number += 1
            await asyncio.sleep(rng.expovariate(1 / gap))
        await asyncio.gather(*open_ones)


async def _flush(client: aiohttp.ClientSession, url: str, tally: Tally) -> None:
    """A flush while requests run, which SGLang refuses, or while none does."""
    try:
        async with client.post(url + "/flush_cache") as response:
            tally.flushes += response.status == 200
            tally.refused_flushes += response.status == 400
            if response.status not in (200, 400):
                tally.problem(f"/flush_cache: HTTP {response.status}")
    except (aiohttp.ClientError, TimeoutError) as error:
        tally.problem(f"/flush_cache: {type(error).__name__}: {error}")
