"""Requests that share pages answer as they do alone, without a cache."""

import pytest
import requests

from test.server.compare import assert_same, reads, tokens
from test.server.conftest import CHUNK, PAGE
from test.server.process import Engine, Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW = 16


def test_eight_requests_on_one_prefix(server: Server, uncached: Engine, prompts: Prompts) -> None:
    context, values = prompts.context(1400, seed=100)
    asked = [prompts.ask(context, key, value).ids for key, value in list(values.items())[:8]]
    server.flush()
    first = server.generate(asked[0], max_new_tokens=NEW)
    rest = server.together(asked[1:], max_new_tokens=NEW)
    assert first["meta_info"]["cached_tokens"] == 0
    for answer in rest:
        assert answer["meta_info"]["cached_tokens"] >= len(context) // PAGE * PAGE - PAGE
    assert_same([first, *rest], uncached.generate(asked, max_new_tokens=NEW))


def test_prompts_that_end_anywhere_in_a_page(
    server: Server, uncached: Engine, prompts: Prompts
) -> None:
    """Prefill in chunks; the last chunk and the answer begin at every kind of offset in a page."""
    lengths = [5 * CHUNK + extra for extra in (0, 1, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1)]
    asked = [prompts.recall(length, seed=200 + length).ids for length in lengths]
    got = server.together(asked, max_new_tokens=PAGE + 2)
    assert [answer["meta_info"]["prompt_tokens"] for answer in got] == lengths
    assert_same(got, uncached.generate(asked, max_new_tokens=PAGE + 2))


def test_a_hit_in_the_middle_of_a_prompt(
    server: Server, uncached: Engine, prompts: Prompts
) -> None:
    """The prefix that hits ends inside a chunk, so the next chunk starts there."""
    context, values = prompts.context(1000, seed=300)
    shared = context[: 3 * CHUNK + 5 * PAGE + 3]
    server.generate(shared, max_new_tokens=1)
    key, value = next(iter(values.items()))
    asked = prompts.ask(context, key, value).ids
    got = server.generate(asked, max_new_tokens=NEW)
    assert got["meta_info"]["cached_tokens"] == 3 * CHUNK + 5 * PAGE
    assert_same([got], uncached.generate([asked], max_new_tokens=NEW))


def test_flush_then_other_prompts_in_the_same_pages(
    server: Server, uncached: Engine, prompts: Prompts
) -> None:
    before = [prompts.recall(900, seed=seed).ids for seed in (400, 410)]
    after = [prompts.recall(900, seed=seed).ids for seed in (420, 430)]
    server.flush()
    first = [server.generate(ids, max_new_tokens=NEW) for ids in before]
    server.flush()
    assert server.load()["num_used_tokens"] == 0
    second = [server.generate(ids, max_new_tokens=NEW) for ids in after]
    again = server.generate(before[0], max_new_tokens=NEW)
    assert again["meta_info"]["cached_tokens"] == 0
    want = uncached.generate([*before, *after, before[0]], max_new_tokens=NEW)
    assert_same([*first, *second, again], want)


def test_abort_in_the_middle_of_decode(server: Server, uncached: Engine, prompts: Prompts) -> None:
    """A client leaves; the next request continues on the pages that were left behind."""
    context, values = prompts.context(1200, seed=500)
    key, value = list(values.items())[4]
    asked = prompts.ask(context, key, value).ids
    stream = server.stream(asked, max_new_tokens=2000, ignore_eos=True)
    for _ in range(5):
        next(stream)
    stream.close()
    server.wait_idle()
    got = server.generate(asked, max_new_tokens=NEW)
    assert got["meta_info"]["cached_tokens"] >= len(context) // PAGE * PAGE - PAGE
    assert_same([got], uncached.generate([asked], max_new_tokens=NEW))


def test_abort_in_the_middle_of_prefill(server: Server, uncached: Engine, prompts: Prompts) -> None:
    context, values = prompts.context(5000, seed=600)
    key, value = next(iter(values.items()))
    asked = prompts.ask(context, key, value).ids
    with pytest.raises(requests.Timeout):
        server.post(
            "/generate",
            {"input_ids": asked, "sampling_params": {"max_new_tokens": 4}},
            timeout=(10, 1.0),
        )
    server.post("/abort_request", {"abort_all": True, "rid": ""})
    server.wait_idle()
    short = asked[: 20 * PAGE + 5] + prompts.ids(f"\n? {key}:")
    got = server.generate(short, max_new_tokens=NEW)
    assert_same([got], uncached.generate([short], max_new_tokens=NEW))
    server.assert_no_leak()


def test_a_rule_shares_only_with_its_own_kind(server: Server, prompts: Prompts) -> None:
    asked = prompts.recall(807, seed=700).ids
    server.flush()
    rules = [{}, {"psa_coverage": 0.9}, {"psa_delta": 0.02}, {"psa_policy": "dense"}]
    for rule in rules:
        first = server.generate(asked, max_new_tokens=4, custom_params=rule)
        again = server.generate(asked, max_new_tokens=4, custom_params=rule)
        assert first["meta_info"]["cached_tokens"] == 0, rule
        assert again["meta_info"]["cached_tokens"] == len(asked) // PAGE * PAGE, rule
        assert tokens([again]) == tokens([first])
    dense = server.generate(asked, max_new_tokens=4, custom_params={"psa_delta": 0})
    assert dense["meta_info"]["cached_tokens"] == len(asked) // PAGE * PAGE
    assert reads(dense)["bytes_fraction"] == 1


def test_dense_requests_never_read_what_sparse_ones_wrote(
    server: Server, uncached: Engine, prompts: Prompts
) -> None:
    """A conversation goes on densely after a sparse answer, and after a dense one."""
    asked = prompts.recall(800, seed=800).ids
    dense = {"psa_policy": "dense"}
    server.flush()
    sparse = server.generate(asked, max_new_tokens=2 * PAGE, ignore_eos=True)
    turn = asked + sparse["output_ids"] + prompts.ids("\n# last word: 123456\n? last word:")
    got = server.generate(turn, max_new_tokens=NEW, custom_params=dense)
    again = server.generate(turn, max_new_tokens=NEW, custom_params=dense)
    assert got["meta_info"]["cached_tokens"] == 0
    assert again["meta_info"]["cached_tokens"] == len(turn) // PAGE * PAGE
    want = uncached.generate([turn], max_new_tokens=NEW, custom_params=dense)
    assert tokens([got]) == tokens([again]) == tokens(want)
    third = turn + got["output_ids"] + prompts.ids("\n? last word:")
    end = server.generate(third, max_new_tokens=NEW, custom_params=dense)
    assert end["meta_info"]["cached_tokens"] >= len(turn) // PAGE * PAGE
    assert tokens([end]) == tokens(
        uncached.generate([third], max_new_tokens=NEW, custom_params=dense)
    )
