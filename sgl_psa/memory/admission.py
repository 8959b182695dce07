"""Admission by working set: what running requests need of the arena, and who decodes.

Prefill may run ahead of decode: its KV goes to the host, and a request that has its first token
takes the place of one that ends at once. But every request more that is admitted makes the turns
of all others rarer, so working sets are admitted up to ``overcommit`` arenas, and requests wait in
the server's queue beyond that.

A larger batch costs loads and saves steps. Of b requests that decode together where b0 fit, each
step gains (b / b0 - 1) of its time and loses what it waits for pages. So while decode hardly ever
waits, loads are hidden, and the arena is planned with as if it were larger; it is not, once waiting
outweighs what a batch half as large again gains.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sgl_psa.memory.turns import Candidate, choose

#: Decode steps whose attended frames are a working set; a longer window hardly finds more
#: (SparseServe: 11 % more overlap from 1 to 12 steps, 0.3 % from 12 to 16).
WINDOW = 12


@dataclass(frozen=True)
class AdmissionLimits:
    """
    Attributes:
        quantum: decode steps of a turn; loading a working set costs a few steps' time, once a turn.
        reserve: share of the arena that no working set is planned into: pages that prefill or a
            paused request left open, and pages that are about to be loaded.
        slack: share of the rest that stays free when a turn begins.
        overcommit: working sets of admitted requests, in arenas.
        prior: share of its pages, sink and recent ones apart, that a request is taken to need
            before any working set is known.
        calm: share of its time that decode waits for pages, below which the plan grows.
        thrash: the same, above which it shrinks.
    """

    quantum: int = 32
    reserve: float = 0.1
    slack: float = 0.1
    overcommit: float = 2.0
    prior: float = 0.25
    calm: float = 0.1
    thrash: float = 1 / 3


#: Factors by which the plan grows and shrinks, and the turns for which it does not grow after that.
_GROWTH, _SHRINKAGE, _REST = 1.25, 1.5, 4


class Running(NamedTuple):
    """A running request: its name, logical pages, and whether it ends with its next step."""

    key: Hashable
    pages: int
    leaves: bool = False


@dataclass
class _Entry:
    since: int
    decodes: bool = False
    #: Decode steps of this turn.
    served: int = 0
    #: Largest working set seen while it filled, then the newest one.
    frames: int = 0
    #: Whether ``frames`` was measured over a whole window.
    known: bool = False


class Admission:
    """The admission of one server.

    Attributes:
        step: decode steps decided so far.
        pauses: times that a request which decoded had to wait.
        stretch: arenas that are planned with, 1 or more.
    """

    def __init__(
        self,
        num_frames: int,
        num_layers: int,
        *,
        forced_pages: int,
        dense_pages: int,
        limits: AdmissionLimits | None = None,
    ) -> None:
        """
        Args:
            num_frames: of the arena, those set aside for pages that are not full apart.
            num_layers: frames that one logical page takes at most.
            forced_pages: pages that every decode step attends, sink and recent ones.
            dense_pages: requests of fewer pages are decoded densely.
        """
        self.limits = limits or AdmissionLimits()
        self.num_frames = num_frames
        self.step = 0
        self.pauses = 0
        self.stretch = 1.0
        self._rest_until = 0
        self._refused = False
        self._layers = num_layers
        self._forced = forced_pages
        self._dense = dense_pages
        self._usable = int(num_frames * (1 - self.limits.reserve))
        self._share = self.limits.prior
        self._shared = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._pages: dict[Hashable, int] = {}

    def decide(self, requests: Sequence[Running]) -> list[bool]:
        """Which of ``requests``, all that run, in order of arrival, take part in the next step."""
        self.step += 1
        self._pages = {request.key: request.pages for request in requests}
        self._entries = {
            request.key: self._entries.get(request.key) or _Entry(self.step) for request in requests
        }
        self._learn_share()
        found = [
            Candidate(self.frames(request.key), entry.decodes, entry.since, request.leaves)
            for request, entry in zip(requests, self._entries.values(), strict=True)
        ]
        chosen = choose(
            found,
            self.step,
            self._room(),
            quantum=self.limits.quantum,
            slack=self.limits.slack,
        )
        for entry, decodes in zip(self._entries.values(), chosen, strict=True):
            if decodes != entry.decodes:
                self.pauses += not decodes
                entry.decodes, entry.since, entry.served = decodes, self.step, 0
            entry.served += decodes
        return chosen

    def observe(self, frames: dict[Hashable, int], shared: int = 0) -> None:
        """Working sets as measured after a step.

        Args:
            frames: of requests that took part in it, pages that several requests hold apart.
            shared: of those pages, once.
        """
        self._shared = shared
        for key, found in frames.items():
            entry = self._entries[key]
            if entry.served >= WINDOW:
                entry.frames, entry.known = found, True
            else:
                entry.frames = max(entry.frames, found)

    def pace(self, waited: float) -> None:
        """Plan with more or less, by the share of the newest steps' time that decode waited."""
        limited = self._refused or not all(entry.decodes for entry in self._entries.values())
        self._refused = False
        if waited > self.limits.thrash and self.stretch > 1:
            self.stretch = max(self.stretch / _SHRINKAGE, 1.0)
            self._rest_until = self.step + _REST * self.limits.quantum
        elif waited < self.limits.calm and limited and self.step >= self._rest_until:
            self.stretch *= _GROWTH

    def decoding(self, key: Hashable) -> bool:
        """Whether a request took part in the newest step."""
        entry = self._entries.get(key)
        return entry is not None and entry.decodes

    def frames(self, key: Hashable) -> int:
        """Working set of a running request, estimated until it is known."""
        entry = self._entries[key]
        return entry.frames if entry.known else max(entry.frames, self.estimate(self._pages[key]))

    def estimate(self, pages: int) -> int:
        """Working set that a request of so many pages is taken to have."""
        forced = min(pages, self._forced)
        share = 1.0 if pages < self._dense else self._share
        return int((forced + share * (pages - forced)) * self._layers)

    def admits(self, pages: int, others: Iterable[tuple[Hashable, int]]) -> bool:
        """Whether one more request may be prefilled.

        Args:
            pages: of the new one.
            others: key and pages of those that run, and of those that are being prefilled.
        """
        charged = [
            self.frames(key) if key in self._entries else self.estimate(count)
            for key, count in others
        ]
        limit = self.limits.overcommit * self._room()
        admitted = not charged or sum(charged) + self.estimate(pages) <= limit
        self._refused |= not admitted
        return admitted

    def snapshot(self) -> dict[str, Any]:
        """``decoding`` and ``paused`` requests; ``pauses`` since start; working sets in frames, of
        all that run, of those that decode, and of shared pages; the frames there are for them, and
        how many times over they are planned with."""
        entries = self._entries
        decoding = [key for key, entry in entries.items() if entry.decodes]
        return {
            "decoding": len(decoding),
            "paused": len(entries) - len(decoding),
            "pauses": self.pauses,
            "working_set": self._shared + sum(map(self.frames, entries)),
            "working_set_decoding": self._shared + sum(map(self.frames, decoding)),
            "working_set_shared": self._shared,
            "usable_frames": self._usable,
            "stretch": self.stretch,
            "working_set_share": self._share,
        }

    def _room(self) -> int:
        return int(max(self._usable - self._shared, 0) * self.stretch)

    def _learn_share(self) -> None:
        """The share of pages that sparse requests need, from those whose working set is known."""
        needed, held = 0, 0
        for key, entry in self._entries.items():
            pages = self._pages[key]
            if entry.known and pages >= max(self._dense, self._forced + 1):
                needed += max(entry.frames - self._forced * self._layers, 0)
                held += (pages - self._forced) * self._layers
        if held:
            self._share = min(needed / held, 1.0)
