"""Real processes under test: a server behind HTTP, an engine behind a socket."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from benchmark import server_process
from benchmark.server_process import (
    REQUEST_SECONDS,
    START_SECONDS,
    STOP_SECONDS,
    Process,
    environment,
    free_port,
    request,
)

__all__ = [
    "REQUEST_SECONDS",
    "START_SECONDS",
    "Engine",
    "Process",
    "Server",
    "environment",
    "free_port",
    "request",
]


#: The scheduler that servers have on GPUs. On CPUs it is off unless asked for.
OVERLAP = {"SGL_PSA_CPU_OVERLAP": "1"}


class Server(server_process.Server):
    """A server with the overlap scheduler unless ``env`` says otherwise."""

    usual = OVERLAP


class Engine(Process):
    """``sgl.Engine`` in a process of its own, driven over a socket."""

    def __init__(self, name: str, options: dict[str, Any], folder: Path) -> None:
        address = str(folder / f"{name}.socket")
        worker = str(Path(__file__).with_name("engine_worker.py"))
        self._listener = Listener(address, family="AF_UNIX")
        command = [sys.executable, worker, address, json.dumps(options)]
        super().__init__(name, command, folder / f"{name}.log", environment(OVERLAP))
        try:
            self._connection = self._accept()
        except BaseException:
            self.stop()
            raise

    def _accept(self) -> Connection:
        accepted: queue.Queue[Connection] = queue.Queue()
        # A daemon: an accept that nobody answers must not keep the interpreter from ending.
        accepting = threading.Thread(
            target=lambda: accepted.put(self._listener.accept()), daemon=True
        )
        accepting.start()
        end = time.monotonic() + START_SECONDS
        while self.popen.poll() is None and time.monotonic() < end:
            try:
                return accepted.get(timeout=0.5)
            except queue.Empty:
                continue
        raise RuntimeError(f"{self.name} did not start\n{self.tail()}")

    def call(self, **arguments: Any) -> Any:
        """``engine.generate(**arguments)``; an exception in it is raised here with its text."""
        self._connection.send(arguments)
        if not self._connection.poll(900):
            raise TimeoutError(f"{self.name} did not answer\n{self.tail()}")
        good, result = self._connection.recv()
        if not good:
            raise RuntimeError(result)
        return result

    def generate(self, prompts: Sequence[list[int]], **sampling: Any) -> list[dict[str, Any]]:
        """Greedy answers to a batch."""
        params = {"temperature": 0, **sampling}
        answers: list[dict[str, Any]] = self.call(input_ids=list(prompts), sampling_params=params)
        return answers

    def stop(self) -> None:
        """Let the worker shut the engine down, then make sure."""
        connection = getattr(self, "_connection", None)
        if connection is not None and self.family():
            connection.send(None)
            self.wait_gone(STOP_SECONDS)
            connection.close()
        self._listener.close()
        super().stop()
