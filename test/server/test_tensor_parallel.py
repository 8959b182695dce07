"""Two ranks over gloo, one KV head each, give the tokens of one rank."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import reads, tokens
from test.server.conftest import COMMON, PSA, flags, running
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def two_ranks(model: Path, logs: Path) -> Iterator[Server]:
    options = flags(model_path=model, tp_size=2, max_total_tokens=16384, **COMMON, **PSA)
    with running(Server("two_ranks", options, logs / "two_ranks.log")) as process:
        yield process


def test_same_tokens_as_one_rank(two_ranks: Server, uncached: Engine, prompts: Prompts) -> None:
    context, values = prompts.context(1000, seed=8000)
    asked = [prompts.ask(context, key, value).ids for key, value in list(values.items())[:4]]
    first = two_ranks.generate(asked[0], max_new_tokens=12)
    got = [first, *two_ranks.together(asked[1:], max_new_tokens=12)]
    want = uncached.generate(asked, max_new_tokens=12)
    assert tokens(got) == tokens(want)
    assert got[-1]["meta_info"]["cached_tokens"] > 900
    for one, whole in zip(got, want, strict=True):
        assert reads(one)["pages_total"] * 2 == reads(whole)["pages_total"], "one KV head of two"
        assert reads(one)["bytes_fraction"] < 1
        assert reads(one)["stale_pages"] == 0
    stats = two_ranks.stats()
    assert stats["active"] and stats["tp_size"] == 2
    assert "rank 0 of 2" in stats["scope"]
    two_ranks.assert_no_leak()
