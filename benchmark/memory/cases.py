"""Which traces are asked of which servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmark.memory import traces
from benchmark.memory.systems import GROUPS, QUARTER, SAME_BYTES, System
from benchmark.memory.traces import Trace, Writer

SEED = 0


class Case(NamedTuple):
    """A trace and the servers that answer it.

    Attributes:
        groups: those that take turns. The very first is all-resident: the answers of the others
            must equal its own.
    """

    name: str
    trace: Callable[[Writer], Trace]
    groups: tuple[tuple[System, ...], ...]

    @property
    def reference(self) -> System:
        """Whose answers are the right ones."""
        return self.groups[0][0]


def cases(kilotokens: int, rounds: int) -> tuple[Case, ...]:
    """With prompts of up to 1024 times ``kilotokens`` tokens."""

    def decode(writer: Writer) -> Trace:
        return traces.decode(
            writer, tokens=1024 * kilotokens, new=48, questions=3, clients=8, rounds=rounds
        )

    def documents(writer: Writer) -> Trace:
        tokens = 768 * kilotokens
        return traces.documents(
            writer, count=16, questions=3, tokens=tokens, new=32, clients=16, rounds=1
        )

    def distinct(writer: Writer) -> Trace:
        return traces.distinct(
            writer, count=16, tokens=512 * kilotokens, new=128 * kilotokens, rounds=1
        )

    return (
        Case("decode", decode, GROUPS),
        Case("documents", documents, ((SAME_BYTES, QUARTER),)),
        Case("distinct", distinct, ((SAME_BYTES, QUARTER),)),
    )


DEFAULT = cases(6, 3)
QUICK = cases(2, 1)
