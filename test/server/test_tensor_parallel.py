"""Two ranks over gloo, one KV head each, K and V of both on two tiers: the tokens of one rank that
holds everything. Each rank has a pool and a host tier of its own.

Two ranks without tiers: ``test_bfloat16``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from test.server.compare import reads, tokens
from test.server.conftest import CHUNK, COMMON, PAGE, PSA, flags, running, tiers
from test.server.host_files import host_file, schedulers
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("shared servers")]

#: Tokens of the host tier, a fifth of them on the device tier.
POOL, SHARE = 4096, 5
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the host tiers' files."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def two_ranks(model: Path, logs: Path, folder: Path) -> Iterator[Server]:
    options = flags(
        model_path=model,
        tp_size=2,
        chunked_prefill_size=CHUNK,
        psa_host_path=folder,
        **tiers(model, POOL, SHARE, ranks=2),
        **COMMON,
        **PSA,
    )
    with running(Server("two_ranks", options, logs / "two_ranks.log")) as process:
        yield process


def test_same_tokens_as_one_rank(two_ranks: Server, uncached: Engine, prompts: Prompts) -> None:
    """Concurrent requests, most of them on one prefix."""
    context, values = prompts.context(1000, seed=8000)
    asked = [prompts.ask(context, key, value).ids for key, value in list(values.items())[:4]]
    asked += [prompts.recall(600 + 70 * n, seed=8050 + 10 * n).ids for n in range(2)]
    first = two_ranks.generate(asked[0], max_new_tokens=NEW)
    got = [first, *two_ranks.together(asked[1:], max_new_tokens=NEW)]
    want = uncached.generate(asked, max_new_tokens=NEW)
    assert tokens(got) == tokens(want)
    assert got[3]["meta_info"]["cached_tokens"] > 900
    for one, whole in zip(got, want, strict=True):
        assert reads(one)["pages_total"] * 2 == reads(whole)["pages_total"], "one KV head of two"
        assert reads(one)["bytes_fraction"] < 1
        assert reads(one)["stale_pages"] == 0
    stats = two_ranks.stats()
    assert stats["active"] and stats["tp_size"] == 2
    assert "rank 0 of 2" in stats["scope"]
    assert two_ranks.memory_problems() == []


def test_the_books_are_those_of_both_ranks(two_ranks: Server, prompts: Prompts) -> None:
    for n in range(3):
        two_ranks.generate(prompts.recall(1207, seed=8100 + 10 * n).ids, max_new_tokens=NEW)
    found = two_ranks.stats()["memory"]
    ranks = found["ranks"]
    assert [rank["tp_rank"] for rank in ranks] == [0, 1]
    assert ranks[0]["hits"] != ranks[1]["hits"], "heads select alike: the sums prove nothing"
    for name in ("hits", "misses", "loads", "bytes_loaded", "frames_used"):
        assert found[name] == sum(rank[name] for rank in ranks), name
        assert all(rank[name] > 0 for rank in ranks), name
    assert found["num_pages"] == 2 * (POOL // PAGE + 1)
    assert found["frames_used"] == sum(found["frames_by_layer"]) <= found["num_frames"]
    two_ranks.assert_no_leak()
    assert two_ranks.memory_problems() == []


def test_a_fault_of_one_rank_ends_the_server(
    two_ranks: Server, prompts: Prompts, folder: Path
) -> None:
    """Rank 1 loses its host tier: it says so, nothing is answered, no process and file is left."""
    asked = [prompts.recall(80 * PAGE + 3, seed=8200 + 10 * n).ids for n in range(2)]
    for ids in asked:
        two_ranks.generate(ids, max_new_tokens=NEW)
    second = schedulers(two_ranks)[1]
    os.truncate(host_file(second, folder), 0)
    try:
        response = two_ranks.post("/generate", {"input_ids": asked[0]})
        assert response.status_code != 200, response.text[:300]
    except requests.RequestException:
        pass
    assert two_ranks.wait_gone(60) == [], two_ranks.tail()
    reason = "the file is shorter than it was made"
    assert [line for line in two_ranks.log.splitlines() if " TP1]" in line and "exception" in line]
    assert reason in two_ranks.log, two_ranks.tail()
    assert list(folder.iterdir()) == []
