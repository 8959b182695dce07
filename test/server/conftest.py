"""The servers and engines that the tests share. A start costs a minute of imports: count them."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from test.server.process import Engine, Process, Server
from test.server.prompts import Prompts

PAGE = 16
CHUNK = 128
CONTEXT = 8192
#: float32, so that another order of summation does not change a greedy token.
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "context_length": CONTEXT,
    "page_size": PAGE,
    "sleep_on_idle": True,
    "log_level": "info",
}
#: Short contexts are already sparse in these tests.
PSA: dict[str, Any] = {"attention_backend": "psa", "psa_min_context": 256}


def flags(**options: Any) -> list[str]:
    """Keyword arguments of ``sgl.Engine`` as flags of ``sglang.launch_server``."""
    found = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        found += [flag] if value is True else [flag, str(value)]
    return found


def tiers(model: Path, tokens: int, share: int, ranks: int = 1) -> dict[str, int]:
    """Bytes of both tiers of each rank for so many ``tokens`` (whole pages) in float32, a
    ``share``-th of them on the device tier."""
    config = json.loads((model / "config.json").read_text())
    row = 2 * config["num_key_value_heads"] // ranks * config["head_dim"] * 4
    page = PAGE * row * config["num_hidden_layers"]
    return {
        "psa_device_pool_bytes": tokens // PAGE * page // share,
        "psa_host_pool_bytes": (tokens // PAGE + 1) * page,
    }


@contextmanager
def running(process: Process) -> Iterator[Any]:
    """``process`` for the block, stopped after it."""
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="session", autouse=True)
def stop_all_when_terminated() -> Iterator[None]:
    """SIGTERM ends pytest like Ctrl-C, so that fixtures stop their servers."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the model that ships with the package."""
    folder = Path(str(resources.files("sgl_psa"))) / "assets" / "recall"
    assert (folder / "config.json").is_file(), f"the package has no model in {folder}"
    return folder


@pytest.fixture(scope="session")
def prompts(model: Path) -> Prompts:
    return Prompts(model)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def server(model: Path, logs: Path) -> Iterator[Server]:
    """The server most tests talk to: prefix cache, small prefill chunks, metrics."""
    options = flags(
        model_path=model,
        served_model_name="recall",
        max_total_tokens=49152,
        enable_metrics=True,
        enable_cache_report=True,
        chunked_prefill_size=CHUNK,
        **COMMON,
        **PSA,
    )
    with running(Server("server", options, logs / "server.log")) as process:
        yield process


@pytest.fixture(scope="session")
def uncached(model: Path, logs: Path) -> Iterator[Engine]:
    """``sgl.Engine`` without prefix cache: the run to compare with. Chunks hold whole prompts."""
    options = {
        "model_path": str(model),
        "disable_radix_cache": True,
        "chunked_prefill_size": CONTEXT,
        "max_total_tokens": 49152,
        **COMMON,
        **PSA,
    }
    with running(Engine("uncached", options, logs)) as process:
        yield process


@pytest.fixture(scope="session")
def served(logs: Path) -> Iterator[Server]:
    """What ``make serve`` runs: the model's own dtype and defaults, but for the pool, which would
    take the memory of servers that other tests start meanwhile.

    ``test_serve_command`` ends it, so modules that use it come before that one.
    """
    options = ["--sleep-on-idle", "--max-total-tokens", "32768"]
    given = {"SGL_PSA_CPU_OVERLAP": "0"}
    process = Server("serve", options, logs / "serve.log", given, module="sglang_psa.serve")
    with running(process):
        yield process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every running process's log with a failure."""
    report = yield
    if report.failed:
        for process in Process.alive:
            report.sections.append((f"log of {process.name}", process.tail()))
    return report
