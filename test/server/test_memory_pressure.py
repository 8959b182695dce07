"""A pool too small for its load: eviction, reuse of pages, retraction, and a clean end.

SGLang checks its books after every batch here, and retracts every few steps whether it must or
not.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import assert_same, tokens
from test.server.conftest import CHUNK, COMMON, PAGE, PSA, flags, running
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("shared servers")]

POOL = 4096
CONTEXT = 2048
NEW = 16
#: Retraction prefills the answer so far again, densely, where the uninterrupted run has KV that
#: was decoded sparsely. This rule leaves so little out that both give the same tokens.
CAREFUL = {"psa_delta": 0.001}


@pytest.fixture(scope="module")
def small(model: Path, logs: Path) -> Iterator[Server]:
    options = flags(
        model_path=model,
        max_total_tokens=POOL,
        chunked_prefill_size=CHUNK,
        max_running_requests=8,
        **{**COMMON, **PSA, "context_length": CONTEXT},
    )
    checks = {
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "5",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    with running(Server("small", options, logs / "small.log", checks)) as process:
        yield process


def test_prefix_hit_after_eviction_and_reuse(
    small: Server, uncached: Engine, prompts: Prompts
) -> None:
    """Others take the pages of a prefix, it returns into pages of theirs, and then it is hit."""
    asked = [prompts.recall(1500 + seed, seed=seed).ids for seed in (1000, 1010, 1020, 1030)]
    asked = [ids[-1500:] for ids in asked]
    target = asked[0]
    first = small.generate(target, max_new_tokens=NEW)
    hit = small.generate(target, max_new_tokens=NEW)
    others = [small.generate(ids, max_new_tokens=NEW) for ids in asked[1:]]
    returned = small.generate(target, max_new_tokens=NEW)
    hit_again = small.generate(target, max_new_tokens=NEW)
    cached = [a["meta_info"]["cached_tokens"] for a in (first, hit, returned, hit_again)]
    whole = len(target) // PAGE * PAGE
    assert cached[1] == cached[3] == whole
    assert cached[2] < whole // 2, "nothing was evicted: the pool is too large for this test"
    want = uncached.generate(asked, max_new_tokens=NEW)
    assert_same([first, hit, returned, hit_again], [want[0]] * 4)
    assert_same(others, want[1:])


def test_more_requests_than_the_pool_holds(
    small: Server, uncached: Engine, prompts: Prompts
) -> None:
    asked = [prompts.recall(700 + 7 * n, seed=1100 + 10 * n).ids for n in range(8)]
    got = small.together(asked, max_new_tokens=NEW, custom_params=CAREFUL)
    want = uncached.generate(asked, max_new_tokens=NEW, custom_params=CAREFUL)
    assert tokens(got) == tokens(want)
    assert all(answer["meta_info"]["psa"]["stale_pages"] == 0 for answer in got)
    small.assert_no_leak()


def test_retract_and_resume(small: Server, uncached: Engine, prompts: Prompts) -> None:
    asked = [prompts.recall(400 + 5 * n, seed=1200 + 10 * n).ids for n in range(5)]
    sampling = {"max_new_tokens": 2 * PAGE + 3, "ignore_eos": True, "custom_params": CAREFUL}
    got = small.together(asked, **sampling)
    assert sum(answer["meta_info"]["num_retractions"] for answer in got) >= 5
    want = uncached.generate(asked, **sampling)
    assert tokens(got) == tokens(want)
    for answer in got:
        reads = answer["meta_info"]["psa"]
        assert reads["stale_pages"] == 0
        assert reads["bytes_fraction"] < 1
        assert reads["pages_total"] > 0
    small.assert_no_leak()


def test_sigterm_during_decode(small: Server, prompts: Prompts) -> None:
    """SGLang lets running requests finish, then every process ends."""
    asked = prompts.recall(600, seed=1400).ids
    events = small.stream(asked, max_new_tokens=150, ignore_eos=True)
    next(events)
    small.signal(signal.SIGTERM)
    sent = time.monotonic()
    last = list(events)[-1]
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 150}
    assert small.wait_gone(90) == [], f"{time.monotonic() - sent:.0f} s after SIGTERM"
    assert small.popen.wait(10) in (0, -signal.SIGKILL), "SGLang ends its own tree by SIGKILL"
    assert "Traceback" not in small.log
