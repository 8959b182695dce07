"""The systems under comparison, and how each is started in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0
STOP_S = 30.0


@dataclass(frozen=True)
class System:
    """Name, worker module, engine arguments."""

    name: str
    worker: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def is_vllm(self) -> bool:
        return self.worker.endswith("vllm_worker")


_SGLANG, _VLLM = "benchmark.serving.sglang_worker", "benchmark.serving.vllm_worker"
SYSTEMS = (
    System("sglang_torch_native", _SGLANG, {"attention_backend": "torch_native"}),
    System("sgl_psa_dense", _SGLANG, {"attention_backend": "psa", "psa_policy": "dense"}),
    System("sgl_psa", _SGLANG, {"attention_backend": "psa"}),
    System("vllm_cpu", _VLLM),
)


class EngineError(RuntimeError):
    """An engine did not start or failed to answer; the message ends with its log."""


class Engine:
    """A running system. Close it: ``with`` does."""

    def __init__(
        self, system: System, settings: dict[str, Any], *, python: str, threads: int
    ) -> None:
        """
        Args:
            settings: model (folder), tokens (of the KV cache), longest (request), kv_bytes.
            python: of the environment that has the engine.

        Raises:
            EngineError: it does not start.
        """
        self.system = system
        self._folder = tempfile.TemporaryDirectory(prefix="bench-serving-")
        self._log = Path(self._folder.name) / "log"
        address = str(Path(self._folder.name) / "socket")
        listener = Listener(address, family="AF_UNIX")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # Packages of this environment stay out of another engine's.
            "PYTHONPATH": str(ROOT) if system.is_vllm else path,
        }
        arguments = {**settings, "arguments": system.arguments}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", system.worker, address, json.dumps(arguments)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        self._connection = None
        try:
            with listener:
                self._connection = self._accept(listener)
            self.version = self._connection.recv()["version"]
        except BaseException as error:
            log_end = self.log()
            self.close()
            if isinstance(error, EOFError):
                raise EngineError(f"{system.name} ended while starting:\n{log_end}") from error
            raise

    def _accept(self, listener: Listener) -> Any:
        """The worker's connection."""
        # The only way to a time limit on a listener of the standard library.
        socket = listener._listener._socket  # type: ignore[attr-defined]
        socket.settimeout(1.0)
        for _ in range(int(START_S)):
            try:
                return listener.accept()
            except TimeoutError:
                if self._process.poll() is not None:
                    raise EngineError(f"{self.system.name} did not start:\n{self.log()}") from None
        raise EngineError(f"{self.system.name} did not start in {START_S:.0f} s:\n{self.log()}")

    def log(self) -> str:
        """The end of what the process printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])

    def answer(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """See :func:`benchmark.serving.worker.timed`.

        Raises:
            EngineError: it could not.
        """
        assert self._connection is not None
        try:
            self._connection.send({"prompts": prompts, "new_tokens": new_tokens})
            found: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineError(f"{self.system.name} ended:\n{self.log()}") from error
        if "error" in found:
            raise EngineError(f"{self.system.name}: {found['error']}\n{self.log()}")
        return found

    def close(self) -> None:
        """Stop the process and its children."""
        if self._connection is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(None)
                self._process.wait(STOP_S)
            self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def vllm_missing(python: str | None) -> str | None:
    """Why vLLM cannot take part, ``None`` if it can."""
    if not python:
        return "no Python of its own: run `make vllm-env`, or give --vllm-python"
    try:
        done = subprocess.run(
            [python, "-c", "import vllm"], capture_output=True, text=True, timeout=START_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python}: {error}; run `make vllm-env`"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{python} cannot import vllm ({last}): run `make vllm-env`"
    return None


def python_of(system: System, vllm_python: str | None) -> str:
    """The interpreter that runs ``system``."""
    return vllm_python if system.is_vllm and vllm_python else sys.executable
