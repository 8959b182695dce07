"""Runs the cases of one model on all systems, alternating, and keeps every sample."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from benchmark.serving.cases import Case, Model, prompts
from benchmark.serving.systems import Engine, EngineError, System, python_of

#: Memory of an engine's processes, without weights and KV.
_PROCESSES = 2_600_000_000
#: Of KV: sketches and summaries of its pages.
_SKETCHES = 1.25
_MEMORY_SHARE = 0.85

Samples = dict[tuple[str, Case], list[dict[str, Any]]]


def engine_bytes(model: Model, cases: list[Case]) -> int:
    """Memory of one engine that serves ``cases``."""
    tokens = max(case.tokens for case in cases)
    return int(_PROCESSES + model.weight_bytes + _SKETCHES * tokens * model.kv_bytes)


def together(model: Model, cases: list[Case], systems: int) -> list[Case]:
    """Those of ``cases`` for which all systems can be up at once."""
    share = psutil.virtual_memory().available * _MEMORY_SHARE / systems
    return [case for case in cases if engine_bytes(model, [case]) < share]


class Rounds:
    """The engines of one model.

    Attributes:
        samples: what the engines answered.
        failed: system -> why it is missing.
    """

    def __init__(
        self,
        model: Model,
        systems: list[System],
        *,
        vllm_python: str | None,
        threads: int,
        new_tokens: int,
        report: Callable[[Rounds], None],
    ) -> None:
        self.model, self.systems = model, systems
        self.vllm_python, self.threads, self.new_tokens = vllm_python, threads, new_tokens
        self.samples: Samples = {}
        self.failed: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._report = report

    def run(self, cases: list[Case]) -> None:
        """All rounds of ``cases``; systems that do not fit side by side take turns, one at a
        time, in every round."""
        shared = together(self.model, cases, len(self.systems))
        if shared:
            with contextlib.ExitStack() as stack:
                # Starting is work of one thread each.
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    started = pool.map(lambda s: self._start(s, shared, stack), self.systems)
                    engines = [engine for engine in started if engine]
                for turn in range(max(case.rounds for case in shared)):
                    for case in (case for case in shared if turn < case.rounds):
                        for engine in engines:
                            self._sample(engine, case, turn)
        for case in (case for case in cases if case not in shared):
            for turn in range(case.rounds):
                for system in self.systems:
                    with contextlib.ExitStack() as stack:
                        if engine := self._start(system, [case], stack):
                            self._sample(engine, case, turn)

    def _start(
        self, system: System, cases: list[Case], stack: contextlib.ExitStack
    ) -> Engine | None:
        """A warm engine, closed with ``stack``; ``None`` if it fails."""
        # A request's last page and the padding page are the pool's as well.
        tokens = max(case.tokens for case in cases) + 1024
        settings = {
            "model": str(self.model.folder),
            "tokens": tokens,
            "longest": max(case.context for case in cases),
            "kv_bytes": tokens * self.model.kv_bytes,
        }
        python = python_of(system, self.vllm_python)
        begin = time.perf_counter()
        try:
            engine = Engine(system, settings, python=python, threads=self.threads)
            stack.enter_context(engine)
            for batch in sorted({case.batch for case in cases}):
                warm = Case("", 160, batch, 1)
                engine.answer(prompts(warm, self.model.words, 8, seed=99), 8)
        except EngineError as error:
            return self._fail(system, error)
        self.versions[system.name] = engine.version
        seconds = time.perf_counter() - begin
        print(f"  {system.name} {engine.version} is up after {seconds:.0f} s", flush=True)
        return engine

    def _sample(self, engine: Engine, case: Case, turn: int) -> None:
        if engine.system.name in self.failed:
            return
        asked = prompts(case, self.model.words, self.new_tokens, seed=turn)
        try:
            found = engine.answer(asked, self.new_tokens)
        except EngineError as error:
            self._fail(engine.system, error)
            return
        self.samples.setdefault((engine.system.name, case), []).append(found)
        steps = statistics.median(found["steps_ms"])
        print(
            f"  {case.model} {case.context} x {case.batch}, round {turn + 1}: "
            f"{engine.system.name:20} prefill {found['prefill_s']:8.2f} s, step {steps:8.2f} ms",
            flush=True,
        )
        self._report(self)

    def _fail(self, system: System, error: Exception) -> None:
        self.failed[system.name] = str(error)
        print(f"!!! {system.name} LEFT OUT: {error}", flush=True)


def rows(run: Rounds) -> list[dict[str, Any]]:
    """One row a system and case: medians over rounds of prefill, over all steps of decode."""
    made = []
    for (system, case), samples in run.samples.items():
        step = statistics.median(ms for sample in samples for ms in sample["steps_ms"])
        shares = [s["meta"]["bytes_fraction"] for s in samples if "bytes_fraction" in s["meta"]]
        made.append(
            {
                "system": system,
                "model": case.model,
                "context": case.context,
                "batch": case.batch,
                "decode_ms_median": step,
                "decode_tok_s": case.batch * 1e3 / step,
                "prefill_s": statistics.median(sample["prefill_s"] for sample in samples),
                "psa_bytes_fraction": statistics.mean(shares) if shares else None,
                "threads": run.threads,
                "rounds": len(samples),
                "steps": sum(len(sample["steps_ms"]) for sample in samples),
                "version": run.versions[system],
            }
        )
    return made
