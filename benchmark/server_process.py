"""A server in a process of its own, started, asked and stopped by benchmarks and tests.

Each runs in a session of its own with its output in a log file. ``stop`` asks, waits, and then
kills whatever is left of it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

import psutil
import requests

START_SECONDS = 600.0
STOP_SECONDS = 60.0
#: One request; generous because other servers may be busy on the same cores.
REQUEST_SECONDS = 300.0
LEAK_MARKS = ("leak detected", "double free", "use-after-free", "Mem Leak")
CRASH_MARKS = ("Scheduler hit an exception", "Traceback (most recent call last)")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings that would change the server that is started.

    One thread a process: the model is too small for more, and threads that wait for each other
    spin, which costs most where several servers share a few cores.
    """
    drop = ("SGL_PSA_", "SGLANG_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**clean, **fixed, **(extra or {})}


def _runs(process: psutil.Process) -> bool:
    """Whether it neither ended nor waits to be reaped; it may end while it is asked."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Process:
    """A child process with its own session, its log and its descendants."""

    alive: ClassVar[list[Process]] = []

    def __init__(self, name: str, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log_path = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        self._family: set[psutil.Process] = set()
        Process.alive.append(self)

    @property
    def log(self) -> str:
        """Everything it printed so far."""
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 60) -> str:
        """The end of the log."""
        return "\n".join(self.log.splitlines()[-lines:])

    def family(self) -> list[psutil.Process]:
        """The process and its descendants that are still running."""
        try:
            root = psutil.Process(self.popen.pid)
            self._family.update([root, *root.children(recursive=True)])
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._family if _runs(process)]

    def signal(self, number: int) -> None:
        """Send a signal to the parent process alone, as a shell or a supervisor does."""
        self.family()
        self.popen.send_signal(number)

    def wait_gone(self, seconds: float) -> list[psutil.Process]:
        """Wait for the whole family to end; returns those that did not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.popen.poll()
            if not self.family():
                return []
            time.sleep(0.2)
        return self.family()

    def stop(self) -> None:
        """End it: SIGINT, and SIGKILL for what remains."""
        if self.family():
            self.popen.send_signal(signal.SIGINT)
            for process in self.wait_gone(STOP_SECONDS):
                process.kill()
        self.popen.wait(STOP_SECONDS)
        Process.alive.remove(self)


class Server(Process):
    """A server that speaks SGLang's HTTP interface.

    Attributes:
        usual: variables that servers of a kind have, unless ``env`` says otherwise.
    """

    usual: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
        module: str = "sglang.launch_server",
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
        super().__init__(
            name, [*command, *arguments], log, environment({**self.usual, **(env or {})})
        )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.popen.poll() is not None:
                raise RuntimeError(f"{self.name} ended while starting\n{self.tail()}")
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"{self.name} not ready after {START_SECONDS:.0f} s\n{self.tail()}")

    def get(self, path: str) -> requests.Response:
        """GET a path."""
        return requests.get(self.url + path, timeout=REQUEST_SECONDS)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        """POST JSON to a path; a string is sent as it is."""
        data = body if isinstance(body, str) else json.dumps(body)
        headers = {"content-type": "application/json"}
        return requests.post(
            self.url + path, data=data, headers=headers, **{"timeout": REQUEST_SECONDS, **options}
        )

    def generate(self, prompt: list[int] | str, **sampling: Any) -> dict[str, Any]:
        """Greedy answer of ``/generate``; keywords are sampling parameters."""
        response = self.post("/generate", request(prompt, **sampling))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def together(self, prompts: Sequence[list[int]], **sampling: Any) -> list[dict[str, Any]]:
        """Answers to prompts that are sent at the same time, each by its own client."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, **sampling), prompts))

    def stream(self, prompt: list[int] | str, **sampling: Any) -> Iterator[dict[str, Any]]:
        """Events of a streamed answer; closing the iterator closes the connection."""
        body = {**request(prompt, **sampling), "stream": True}
        with self.post("/generate", body, stream=True) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines():
                if line.startswith(b"data:") and line != b"data: [DONE]":
                    yield json.loads(line[5:])

    def stats(self) -> dict[str, Any]:
        """``GET /psa/stats``."""
        response = self.get("/psa/stats")
        assert response.status_code == 200, response.text
        stats: dict[str, Any] = response.json()
        return stats

    def memory_problems(self) -> list[str]:
        """What the tiers say of themselves once nothing runs, or why they do not."""
        self.wait_idle()
        end = time.monotonic() + STOP_SECONDS
        # Requests that are done may not be quite gone yet.
        while (response := self.get("/psa/memory/check")).status_code == HTTPStatus.CONFLICT:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        if response.status_code != HTTPStatus.OK:
            return [f"HTTP {response.status_code}: {response.text[:300]}"]
        found: list[str] = response.json()["problems"]
        return found

    def load(self) -> dict[str, Any]:
        """What SGLang says about its queues and its pool."""
        load: dict[str, Any] = self.get("/v1/loads?include=core,memory").json()["loads"][0]
        return load

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Wait until no request runs or waits."""
        end = time.monotonic() + seconds
        while (load := self.load())["num_running_reqs"] + load["num_waiting_reqs"]:
            assert time.monotonic() < end, f"requests remain after {seconds:.0f} s: {load}"
            time.sleep(0.2)

    def flush(self) -> None:
        """Empty the prefix cache."""
        response = self.post("/flush_cache?timeout=30", "")
        assert response.status_code == 200, response.text

    def assert_no_leak(self) -> None:
        """SGLang's own check of the idle pool passed, and after a flush nothing is held.

        The check runs whenever the scheduler goes idle and ends the scheduler when it fails.
        """
        self.wait_idle()
        self.flush()
        self.generate([5, 6, 7], max_new_tokens=1)
        self.flush()
        self.wait_idle()
        load = self.load()
        assert load["num_used_tokens"] == 0, load
        assert not self.marks(), self.tail()

    def marks(self) -> list[str]:
        """Signs of a leak or a crash in the log."""
        log = self.log
        return [mark for mark in LEAK_MARKS + CRASH_MARKS if mark in log]


def request(prompt: list[int] | str, **sampling: Any) -> dict[str, Any]:
    """The body of a greedy ``/generate`` request."""
    key = "text" if isinstance(prompt, str) else "input_ids"
    return {key: prompt, "sampling_params": {"temperature": 0, **sampling}}
