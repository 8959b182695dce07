"""``python -m sglang_psa.serve``, what ``make serve`` runs."""

import signal
import time

import pytest

from sgl_psa.crossover import CROSSOVER
from test.server.compare import reads
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server


def test_it_says_that_it_is_ready(served: Server) -> None:
    end = time.monotonic() + 30
    while f"PSA server ready: {served.url}" not in served.log:
        assert time.monotonic() < end, served.tail()
        time.sleep(0.2)


def test_it_decodes_sparsely_from_the_default_context_on(served: Server, prompts: Prompts) -> None:
    short = served.generate(prompts.recall(900, seed=8500).ids, max_new_tokens=8)
    assert reads(short)["bytes_fraction"] == 1
    long = max(CROSSOVER.values()) + 500
    asked = [prompts.recall(long, seed=8510 + 10 * n).ids for n in range(3)]
    for answer in served.together(asked, max_new_tokens=8):
        assert 0 < reads(answer)["bytes_fraction"] < 0.6
        assert reads(answer)["stale_pages"] == 0
    assert served.stats()["active"]
    served.assert_no_leak()


def test_it_stops_all_its_processes_in_mid_decode(served: Server, prompts: Prompts) -> None:
    events = served.stream(
        prompts.recall(1500, seed=8600).ids, max_new_tokens=3000, ignore_eos=True
    )
    next(events)
    served.signal(signal.SIGTERM)
    assert served.wait_gone(60) == []
    assert served.popen.wait(10) == 0
