"""K and V on two tiers: the tokens of the resident run from a fraction of its memory.

One server keeps a quarter of the pool near the compute and the rest in a file, and retracts every
few steps whether it must or not; the other keeps a tenth, the rest in memory, and has two threads.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from test.server.compare import assert_same, reads, tokens
from test.server.conftest import CHUNK, COMMON, PAGE, PSA, flags, running, tiers
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("shared servers")]

#: Tokens of the host tier; float32.
POOL = 6144
NEW = 20
#: Retraction prefills the answer so far again, densely; with this rule both give the same tokens.
CAREFUL = {"psa_delta": 0.001}
SHARES = {"quarter": 4, "tenth": 10}
#: Threads that wait for each other on cores that others use must not spin for long.
TWO_THREADS = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000"}


@pytest.fixture(scope="module", params=SHARES)
def tiered(request: pytest.FixtureRequest, model: Path, logs: Path, tmp_path_factory) -> Iterator:
    name = request.param
    options = dict(
        model_path=model,
        chunked_prefill_size=CHUNK,
        max_running_requests=8,
        enable_metrics=True,
        **tiers(model, POOL, SHARES[name]),
        **{**COMMON, **PSA, "context_length": 4096},
    )
    checks = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    }
    if name == "quarter":
        options["psa_host_path"] = tmp_path_factory.mktemp("host")
        checks |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    else:
        checks |= TWO_THREADS
    with running(Server(name, flags(**options), logs / f"{name}.log", checks)) as process:
        yield process


def memory(server: Server) -> dict:
    """Section ``memory`` of ``/psa/stats``."""
    return server.stats()["memory"]


def assert_in_order(server: Server) -> None:
    """The integrity check of the idle server finds nothing."""
    server.wait_idle()
    end = time.monotonic() + 30
    while (answer := server.get("/psa/memory/check")).status_code == 409:
        assert time.monotonic() < end, "the server does not become idle"
        time.sleep(0.1)
    assert answer.json() == {"problems": []}, answer.text


def test_same_tokens_from_a_fraction_of_the_memory(
    tiered: Server, uncached: Engine, prompts: Prompts
) -> None:
    """Concurrent requests, some on one prefix, one longer than the device tier."""
    context, values = prompts.context(1000, seed=3000)
    keys = list(values)[:3]
    asked = [prompts.ask(context, key, values[key]).ids for key in keys]
    asked += [prompts.recall(400 + 90 * n, seed=3100 + 10 * n).ids for n in range(3)]
    asked.append(prompts.recall(2000, seed=3200).ids)
    sampling = {"max_new_tokens": NEW, "ignore_eos": True, "custom_params": CAREFUL}
    want = uncached.generate(asked, **sampling)
    got = tiered.together(asked, **sampling)
    assert tokens(got) == tokens(want)
    assert all(reads(answer)["stale_pages"] == 0 for answer in got)
    if "quarter" in tiered.name:
        assert sum(answer["meta_info"]["num_retractions"] for answer in got) > 0
    assert tiered.stats()["threads"] == (2 if "tenth" in tiered.name else 1)
    found = memory(tiered)
    assert found["num_pages"] == POOL // PAGE + 1
    assert found["num_frames"] * PAGE < 2000 * len(found["frames_by_layer"]), "a small device tier"
    for name in ("hits", "loads", "bytes_loaded", "bytes_saved", "evictions", "working_set_bytes"):
        assert found[name] > 0, name
    assert 0 < found["hit_rate"] < 1
    assert found["frames_used"] == sum(found["frames_by_layer"]) <= found["num_frames"]
    assert_in_order(tiered)


def test_a_prefix_whose_frames_are_gone_is_still_a_hit(
    tiered: Server, uncached: Engine, prompts: Prompts
) -> None:
    asked = [prompts.recall(1207, seed=3300 + 10 * n).ids for n in range(3)]
    first = [tiered.generate(ids, max_new_tokens=NEW) for ids in asked]
    again = tiered.generate(asked[0], max_new_tokens=NEW)
    assert again["meta_info"]["cached_tokens"] == len(asked[0]) // PAGE * PAGE
    assert memory(tiered)["num_frames"] < 3 * len(asked[0]) // PAGE * 5
    want = uncached.generate(asked, max_new_tokens=NEW)
    if "tenth" in tiered.name:
        assert_same([*first, again], [*want, want[0]])
    assert_in_order(tiered)


def test_more_requests_than_the_host_tier_holds(
    tiered: Server, uncached: Engine, prompts: Prompts
) -> None:
    asked = [prompts.recall(1100 + 7 * n, seed=3400 + 10 * n).ids for n in range(8)]
    sampling = {"max_new_tokens": NEW, "ignore_eos": True, "custom_params": CAREFUL}
    got = tiered.together(asked, **sampling)
    assert tokens(got) == tokens(uncached.generate(asked, **sampling))
    assert_in_order(tiered)


def test_aborts_and_flushes_leave_nothing_behind(
    tiered: Server, uncached: Engine, prompts: Prompts
) -> None:
    asked = prompts.recall(1500, seed=3500).ids
    stream = tiered.stream(asked, max_new_tokens=1000, ignore_eos=True)
    for _ in range(3):
        next(stream)
    busy = tiered.get("/psa/memory/check")
    assert busy.status_code == 409 and "not idle" in busy.text
    stream.close()
    with pytest.raises(requests.Timeout):
        body = {"input_ids": prompts.recall(3000, seed=3600).ids}
        tiered.post("/generate", body, timeout=(10, 0.5))
    tiered.post("/abort_request", {"abort_all": True, "rid": ""})
    assert_in_order(tiered)
    got = tiered.generate(asked, max_new_tokens=NEW, custom_params=CAREFUL)
    want = uncached.generate([asked], max_new_tokens=NEW, custom_params=CAREFUL)
    assert tokens([got]) == tokens(want)
    tiered.assert_no_leak()
    assert_in_order(tiered)
    found = memory(tiered)
    assert found["frames_used"] <= len(found["frames_by_layer"]), "frames after a flush"


def test_the_metrics_follow(tiered: Server, prompts: Prompts) -> None:
    asked = [prompts.recall(1207, seed=3600 + 10 * n).ids for n in range(3)]
    for ids in (*asked, asked[0]):  # The first one's pages come back from the host.
        tiered.generate(ids, max_new_tokens=4)
    time.sleep(1.1)  # The series are brought up to date once a second.
    tiered.generate(prompts.recall(700, seed=3700).ids, max_new_tokens=4)
    text = tiered.get("/metrics").text
    series = [line for line in text.splitlines() if line.startswith("sglang:psa_memory_")]
    loads = [line for line in series if line.startswith("sglang:psa_memory_loads_total")]
    assert loads and float(loads[0].rsplit(" ", 1)[1]) > 0
    layers = [line for line in series if line.startswith("sglang:psa_memory_frames{")]
    assert len(layers) == len(memory(tiered)["frames_by_layer"])
