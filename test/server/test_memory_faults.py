"""Two tiers when something fails: a disk without room, a host tier without room, a scheduler that
is killed, a file that is cut short. Errors say what happened; nothing wrong is answered."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from test.server.compare import tokens
from test.server.conftest import CHUNK, COMMON, PAGE, PSA, flags, running
from test.server.host_files import host_file, schedulers
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("shared servers")]

#: Tokens of the host tier, and bytes of a token: 5 layers, K and V, 2 heads of 128, float32.
POOL, TOKEN_BYTES = 4096, 5 * 2 * 2 * 128 * 4
#: Whole pages and a part of one, so that a second answer to it saves nothing before it reads.
LENGTH, NEW = 80 * PAGE + 3, 8
CAREFUL = {"psa_delta": 0.001}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the host tier's file."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def start(model: Path, logs: Path, folder: Path) -> Any:
    def make(name: str) -> Server:
        host_bytes = (POOL + PAGE) * TOKEN_BYTES
        options = flags(
            model_path=model,
            chunked_prefill_size=CHUNK,
            psa_device_pool_bytes=host_bytes // 5,
            psa_host_pool_bytes=host_bytes,
            psa_host_path=folder,
            **COMMON,
            **PSA,
        )
        return Server(name, options, logs / f"{name}.log")

    return make


@pytest.fixture(scope="module")
def tiered(start: Any) -> Iterator[Server]:
    with running(start("faulty")) as process:
        yield process


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """What is started here cannot make files of more than ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_ends_the_start(start: Any, folder: Path) -> None:
    with (
        file_limit(POOL * TOKEN_BYTES // 2),
        pytest.raises(RuntimeError, match=r"has no room for host_pool_bytes=.*set host_pool_bytes"),
    ):
        start("full disk")
    assert list(folder.iterdir()) == []


def test_a_full_host_tier(tiered: Server, uncached: Engine, prompts: Prompts) -> None:
    """A prompt longer than it is refused; more prompts than it holds wait; all else goes on."""
    asked = [prompts.recall(1100 + 16 * n, seed=8000 + 10 * n).ids for n in range(6)]
    long = prompts.filler(POOL + 100, seed=8100)
    sampling = {"max_new_tokens": NEW, "ignore_eos": True, "custom_params": CAREFUL}
    with ThreadPoolExecutor(2) as pool:
        refused = pool.submit(tiered.post, "/generate", {"input_ids": long})
        got = pool.submit(tiered.together, asked, **sampling).result()
    answer = refused.result()
    assert answer.status_code == 400, answer.text[:300]
    assert "longer than" in answer.text or "exceeds" in answer.text, answer.text[:300]
    assert tokens(got) == tokens(uncached.generate(asked, **sampling))
    tiered.assert_no_leak()
    assert tiered.get("/psa/memory/check").json() == {"problems": []}


def test_faults_that_end_a_server(
    start: Any, tiered: Server, uncached: Engine, prompts: Prompts, folder: Path
) -> None:
    kill_the_scheduler(tiered, uncached, prompts, folder)
    with running(start("again")) as again:
        cut_the_file_short(again, uncached, prompts, folder)


def kill_the_scheduler(tiered: Server, uncached: Engine, prompts: Prompts, folder: Path) -> None:
    """The answer under way breaks off, the server ends, and no file is left."""
    asked = prompts.recall(LENGTH, seed=8200).ids
    events = tiered.stream(asked, max_new_tokens=1000, ignore_eos=True, custom_params=CAREFUL)
    so_far = next(events)["output_ids"]
    (scheduler,) = schedulers(tiered)
    os.kill(scheduler.pid, signal.SIGKILL)
    try:
        for event in events:
            so_far = event.get("output_ids", so_far)
    except requests.RequestException:
        pass
    assert len(so_far) < 1000
    want = uncached.generate([asked], max_new_tokens=len(so_far), custom_params=CAREFUL)
    assert so_far == tokens(want)[0]
    assert tiered.wait_gone(120) == []
    assert list(folder.iterdir()) == []


def cut_the_file_short(again: Server, uncached: Engine, prompts: Prompts, folder: Path) -> None:
    """Restarted on the same folder, it answers; when its file loses its end, it stops with the
    reason instead of answering."""
    asked = [prompts.recall(LENGTH, seed=8300 + 10 * n).ids for n in range(2)]
    sampling = {"max_new_tokens": NEW, "ignore_eos": True, "custom_params": CAREFUL}
    first = [again.generate(ids, **sampling) for ids in asked]
    assert tokens(first) == tokens(uncached.generate(asked, **sampling))
    (scheduler,) = schedulers(again)
    os.truncate(host_file(scheduler, folder), 0)
    try:
        response = again.post(
            "/generate", {"input_ids": asked[0], "sampling_params": {"temperature": 0, **sampling}}
        )
        assert response.status_code != 200, response.text[:300]
    except requests.RequestException:
        pass
    end = time.monotonic() + 120
    while again.family() and time.monotonic() < end:
        time.sleep(0.5)
    assert not again.family(), again.tail()
    assert "the file is shorter than it was made" in again.log, again.tail()
