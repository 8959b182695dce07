"""Runs a case: groups of servers that are up at once and answer in turns, every pass and round."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmark.memory.cases import Case
from benchmark.memory.measure import Sample, equal, figures, run
from benchmark.memory.systems import PAGE_SIZE, Model, Sizes, System, flags, sizes
from benchmark.memory.traces import Pass, Trace
from benchmark.server_process import Server

Row = dict[str, Any]
#: Counters of ``memory`` in ``/psa/stats`` that rows have the growth of.
COUNTERS = ("hits", "loads", "bytes_loaded", "bytes_saved", "bytes_in_vain", "evictions")
#: Memory of a server's processes, without pools.
_PROCESSES = 3_000_000_000
_MEMORY_SHARE = 0.85
_HISTORY = 64
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}


class Up:
    """A running server and what it answered."""

    def __init__(self, system: System, server: Server, sized: Sizes) -> None:
        self.system, self.server, self.sizes = system, server, sized
        self.samples: dict[str, list[Sample]] = {}
        self.grown: dict[str, dict[str, float]] = {}
        self.failed = ""

    @property
    def memory(self) -> dict[str, Any] | None:
        """``memory`` of ``/psa/stats``; ``None`` if all-resident."""
        found: dict[str, Any] | None = self.server.stats().get("memory")
        return found

    def answer(self, asked: Pass, turn: int) -> Sample:
        """One round of a pass."""
        if asked.cold:
            self.server.wait_idle()
            self.server.flush()
        before = self.memory
        sample = run(self.server.url, asked, f"{asked.name}-{turn}")
        self.server.wait_idle()
        after = self.memory
        self.samples.setdefault(asked.name, []).append(sample)
        if before is not None and after is not None:
            grown = self.grown.setdefault(asked.name, dict.fromkeys(COUNTERS, 0))
            for name in COUNTERS:
                grown[name] += after[name] - before[name]
        return sample


class CaseRun:
    """One case.

    Attributes:
        rows: of finished passes.
        failed: server -> why it is missing.
    """

    def __init__(
        self, case: Case, trace: Trace, model: Model, options: Namespace, folder: Path
    ) -> None:
        self.case, self.trace, self.model, self.options = case, trace, model, options
        self.folder = folder
        self.kv_tokens = trace.kv_tokens(PAGE_SIZE)
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self._wanted: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def run(self, names: set[str], report: Callable[[], None]) -> None:
        """Measure the reference and the servers called ``names``."""
        for group in self.case.groups:
            left = [s for s in group if s.name in names or s == self.case.reference]
            for together in self._fitting(left):
                with self._up(together) as up:
                    for asked in self.trace.passes:
                        self._pass(asked, up)
                        report()

    def _fitting(self, group: list[System]) -> Iterator[list[System]]:
        """``group`` in parts that memory holds at once."""
        while group:
            room = psutil.virtual_memory().available * _MEMORY_SHARE
            count = 0
            for system in group:
                sized = self._sizes(system)
                room -= _PROCESSES + sized.device_bytes + sized.tokens * self._token_bytes
                if room < 0:
                    break
                count += 1
            yield group[: max(count, 1)]
            group = group[max(count, 1) :]

    @property
    def _token_bytes(self) -> int:
        return self.model.page_bytes // PAGE_SIZE

    def _sizes(self, system: System) -> Sizes:
        return sizes(system, self.model, self.kv_tokens, self.trace.concurrency)

    @contextlib.contextmanager
    def _up(self, group: list[System]) -> Iterator[list[Up]]:
        def start(system: System) -> Up | str:
            try:
                return self._start(system, stack)
            except (RuntimeError, OSError, AssertionError) as error:
                return str(error)

        with contextlib.ExitStack() as stack:
            # Starting is work of one thread each.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                started = list(pool.map(start, group))
            for system, one in zip(group, started, strict=True):
                if isinstance(one, str):
                    self._fail(system, one)
            yield [one for one in started if isinstance(one, Up)]

    def _start(self, system: System, stack: contextlib.ExitStack) -> Up:
        sized = self._sizes(system)
        clients, options = self.trace.concurrency, self.options
        arguments = flags(system, self.model, sized, clients, options.device, self.folder)
        name = f"{self.case.name}_{system.name}".replace(" ", "_").replace("%", "")
        server = Server(
            system.name,
            arguments,
            self.folder / f"{name}.log",
            {
                "OMP_NUM_THREADS": str(options.threads),
                **(RETRACT if self.case.retract and system != self.case.reference else {}),
            },
        )
        stack.callback(server.stop)
        # What is compiled or allocated on first use.
        server.generate([5, 6, 7] * 8, max_new_tokens=2)
        server.generate(list(self.trace.asks[0].ids), max_new_tokens=4)
        print(f"  {system.name} is up: {sized.tokens} tokens of room", flush=True)
        return Up(system, server, sized)

    def _fail(self, system: System, why: str) -> None:
        self.failed[system.name] = why
        print(f"!!! {system.name} LEFT OUT: {why}", flush=True)
        if system == self.case.reference:
            raise RuntimeError(f"{self.case.name}: no answers to compare with")

    def _pass(self, asked: Pass, up: list[Up]) -> None:
        for turn in range(asked.rounds):
            for one in up:
                if not one.failed:
                    self._turn(asked, turn, one)
        self.rows += [self._row(asked, one) for one in up if not one.failed]

    def _turn(self, asked: Pass, turn: int, one: Up) -> None:
        try:
            sample = one.answer(asked, turn)
        except (OSError, AssertionError) as error:
            one.failed = f"{error}\n{one.server.tail(25)}"
            self._fail(one.system, one.failed)
            return
        if one.system == self.case.reference:
            for answer in sample.answers:
                self._wanted.setdefault((asked.name, answer.ask.ids), answer.ids)
        figured = figures([sample])
        rate = figured["decode_tok_s"]
        print(
            f"  {asked.name:9} round {turn + 1}: {one.system.name:26}"
            f"{figured['request_throughput']:8.3f} requests/s, "
            f"{'-' if rate is None else f'{rate:.1f}'} tokens/s, errors: "
            f"{sum(bool(a.error) for a in sample.answers)}",
            flush=True,
        )

    def _row(self, asked: Pass, one: Up) -> Row:
        """The row of a pass over a server."""
        samples = one.samples[asked.name]
        wanted = {ids: tokens for (name, ids), tokens in self._wanted.items() if name == asked.name}
        memory, grown = one.memory, one.grown.get(asked.name)
        same = all(equal(sample.answers, wanted) for sample in samples)
        row = {
            "trace": asked.name,
            **one.system.columns,
            "concurrency": asked.concurrency,
            **figures(samples),
            **(grown or dict.fromkeys(COUNTERS)),
            "hit_rate": _hit_rate(grown, memory),
            "outputs_equal_resident": same,
            "kv_bytes": one.sizes.kv_bytes,
            "device_bytes": one.sizes.device_bytes,
            "room_tokens": one.sizes.tokens,
            "residency": _history(memory) if memory else None,
            "device": self.options.device,
            "dtype": self.model.dtype,
            "threads": self.options.threads,
        }
        errors = [a.error for sample in samples for a in sample.answers if a.error]
        if errors:
            row["errors"] = sorted(set(errors))[:4]
        return row


def _hit_rate(grown: dict[str, float] | None, memory: dict[str, Any] | None) -> float | None:
    """Share of attended pages, of (row, KV head) pairs, that had a frame; ``None`` if none were."""
    if grown is None or memory is None:
        return None
    attended = grown["hits"] + grown["loads"] - grown["bytes_in_vain"] // memory["record_bytes"]
    return grown["hits"] / attended if attended else None


def _history(memory: dict[str, Any]) -> dict[str, Any]:
    """What a picture of the residency is made from: frames of each layer over steps, thinned."""
    history = memory["history"]
    every = max(1, len(history["steps"]) // _HISTORY)
    return {
        "num_frames": memory["num_frames"],
        "frames_by_layer": memory["frames_by_layer"],
        "history": {name: values[::every] for name, values in history.items()},
    }
