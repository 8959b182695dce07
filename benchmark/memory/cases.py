"""Which traces are asked of which servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmark.memory import traces
from benchmark.memory.systems import ARENAS, CAPACITY, VARIANTS, System
from benchmark.memory.traces import Trace, Writer

SEED = 0


class Case(NamedTuple):
    """A trace and the servers that answer it.

    Attributes:
        groups: those that take turns. The very first is all-resident: the answers of the others
            must equal its own.
        retract: the others retract requests every few steps, whether they must or not.
    """

    name: str
    trace: Callable[[Writer], Trace]
    groups: tuple[tuple[System, ...], ...]
    retract: bool = False

    @property
    def reference(self) -> System:
        """Whose answers are the right ones."""
        return self.groups[0][0]


def cases(kilotokens: int, rounds: int) -> tuple[Case, ...]:
    """With prompts of up to 1024 times ``kilotokens`` tokens."""

    def equal(writer: Writer) -> Trace:
        return traces.equal(writer, tokens=2048, new=48, clients=8)

    def decode(writer: Writer) -> Trace:
        return traces.decode(
            writer, tokens=1024 * kilotokens, new=48, questions=3, clients=8, rounds=rounds
        )

    def documents(writer: Writer) -> Trace:
        tokens = 768 * kilotokens
        return traces.documents(
            writer, count=16, questions=6, tokens=tokens, new=32, clients=16, rounds=1
        )

    def distinct(writer: Writer) -> Trace:
        return traces.distinct(
            writer, count=16, tokens=512 * kilotokens, new=128 * kilotokens, rounds=1
        )

    return (
        Case("equal", equal, ARENAS, retract=True),
        Case("decode", decode, VARIANTS),
        Case("documents", documents, CAPACITY),
        Case("distinct", distinct, CAPACITY),
    )


DEFAULT = cases(6, 3)
QUICK = cases(2, 1)
