"""What is asked: long prompts that share prefixes in part, in the embedded model's language."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from benchmark.stream_client import ABORT, DISCONNECT, Ask
from sgl_psa.evaluate.cli import EMBEDDED
from sgl_psa.evaluate.example import Example
from sgl_psa.evaluate.material import RECALL, Material
from sgl_psa.evaluate.prompt import Prompt
from sgl_psa.evaluate.tasks import TASKS

TASK = "multi_key"
#: What a retracted request decoded sparsely is prefilled densely, its next token too; with this
#: rule both give the same tokens, but where two are as likely within a thousandth.
CAREFUL = (("psa_delta", 1e-5),)


class Pass(NamedTuple):
    """Requests sent by ``concurrency`` clients; ``rounds`` times, after a flush if ``cold``."""

    name: str
    asks: tuple[Ask, ...]
    concurrency: int
    rounds: int
    cold: bool


@dataclass(frozen=True)
class Trace:
    """Passes that a server answers one after the other."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def asks(self) -> tuple[Ask, ...]:
        """Every request."""
        return tuple(ask for one in self.passes for ask in one.asks)

    @property
    def concurrency(self) -> int:
        """Most clients at once."""
        return max(one.concurrency for one in self.passes)

    def kv_tokens(self, page_size: int) -> int:
        """Tokens, in whole pages, of the KV that the trace makes: shared prefixes once, and the
        answers of as many requests as there are clients."""
        answers = sorted((ask.new_tokens for ask in self.asks), reverse=True)[: self.concurrency]
        pages = distinct_pages((ask.ids for ask in self.asks), page_size)
        return page_size * (pages + sum(-(-new // page_size) + 1 for new in answers))


def distinct_pages(prompts: Iterable[Sequence[int]], page_size: int) -> int:
    """Full pages of the prompts that differ in what they hold or in what is before them."""
    seen = set[int]()
    for ids in prompts:
        before = 0
        for start in range(0, len(ids) - page_size + 1, page_size):
            before = hash((before, *ids[start : start + page_size]))
            seen.add(before)
    return len(seen)


class Writer:
    """Makes prompts; the same seed and tokenizer give the same ones."""

    def __init__(self, seed: int, model: Path = EMBEDDED) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.material = Material(tokenizer, RECALL)
        self.prompt = Prompt(tokenizer, chat=False)
        self.seed = seed
        self._made = 0

    def example(self, tokens: int) -> Example:
        """A new context of about ``tokens`` tokens, two fifths of it keys, with its questions."""
        self._made += 1
        made = TASKS[TASK].build(self.material, tokens, f"{self.seed}/{self._made}")
        assert isinstance(made, Example)
        return made

    def documents(self, count: int, questions: int, tokens: int) -> list[tuple[int, ...]]:
        """Prompts of ``count`` contexts with ``questions`` different questions each, shuffled."""
        prompts = []
        for _ in range(count):
            example = self.example(tokens)
            context = self.prompt.context_ids(example)
            for query in example.queries[:questions]:
                prompts.append(tuple(context + self.prompt.turn_ids(query.turns[0])))
        random.Random(self.seed).shuffle(prompts)
        return prompts

    def halves(self, count: int, questions: int, tokens: int) -> list[list[tuple[int, ...]]]:
        """Prompts [questions][count]: ``count`` contexts, of which each pair has the first half in
        common, with questions about either half."""
        prompts: list[list[tuple[int, ...]]] = [[] for _ in range(questions)]
        for number in range(count):
            if number % 2 == 0:
                first = self.example(tokens // 2)
            second = self.example(tokens // 2)
            context = self.prompt.context_ids(first) + self.prompt.encode(second.context)
            for turn, asked in enumerate(prompts):
                queries = (first, second)[(number + turn) % 2].queries
                query = queries[(number // 2 * questions + turn) % len(queries)]
                asked.append(tuple(context + self.prompt.turn_ids(query.turns[0])))
        return prompts


def leaving(asks: Sequence[Ask], every: int) -> list[Ask]:
    """``asks`` of which each ``every``-th gives up half-way, by turns in either way."""
    return [
        replace(
            ask,
            leave_after=ask.new_tokens // 2,
            leave_by=(DISCONNECT, ABORT)[number // every % 2],
        )
        if number % every == every - 1
        else ask
        for number, ask in enumerate(asks)
    ]


def equal(writer: Writer, *, tokens: int, new: int, clients: int) -> Trace:
    """Half as many prompts again as there are clients, half of each shared, some clients leave."""
    (prompts,) = writer.halves(clients + clients // 2, 1, tokens)
    asks = leaving([Ask(ids, new, rule=CAREFUL) for ids in prompts], 4)
    return Trace("equal", (Pass("equal", tuple(asks), clients, 1, True),))


def decode(
    writer: Writer, *, tokens: int, new: int, questions: int, clients: int, rounds: int
) -> Trace:
    """Half as many contexts again as there are clients are prefilled, some clients leave
    (``cold``). Then each of the first ``clients`` is asked more, from the cache (``warm``)."""
    first, *more = writer.halves(clients + clients // 2, questions + 1, tokens)
    cold = leaving([Ask(ids, new // 2) for ids in first], 4)
    warm = tuple(Ask(ids, new) for wave in more for ids in wave[:clients])
    return Trace(
        "decode",
        (
            Pass("cold", tuple(cold), clients, 1, True),
            Pass("warm", warm, clients, rounds, False),
        ),
    )


def documents(
    writer: Writer, *, count: int, questions: int, tokens: int, new: int, clients: int, rounds: int
) -> Trace:
    """Each long context is asked about several times, in random order."""
    asks = tuple(Ask(ids, new) for ids in writer.documents(count, questions, tokens))
    return Trace("documents", (Pass("documents", asks, clients, rounds, True),))


def distinct(writer: Writer, *, count: int, tokens: int, new: int, rounds: int) -> Trace:
    """Long contexts of which none is asked about twice, all at once, and long answers."""
    asks = tuple(Ask(ids, new) for ids in writer.documents(count, 1, tokens))
    return Trace("distinct", (Pass("distinct", asks, count, rounds, True),))
