"""Nothing skipped, nothing changed: greedy tokens equal SGLang's own dense attention."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from test.server.compare import reads, tokens
from test.server.conftest import COMMON, CONTEXT, PSA, running
from test.server.process import Engine
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW = 8
MIN_CONTEXT = PSA["psa_min_context"]
#: 200 prompts, most of them short, all but a few above ``min_context``.
LENGTHS = [MIN_CONTEXT - 32 + n for n in range(188)] + [1500 + 97 * n for n in range(12)]
#: Rules under which every page must be read, or all but a billionth of the mass.
EXACT = [
    {"psa_coverage": 1.0},
    {"psa_delta": 0},
    {"psa_policy": "dense"},
]
TIGHT = [{"psa_coverage": 0.999999999}, {"psa_delta": 1e-9}]


@pytest.fixture(scope="module")
def asked(prompts: Prompts) -> list[list[int]]:
    assert len(LENGTHS) == 200
    return [prompts.recall(length, seed=5000 + 3 * length).ids for length in LENGTHS]


@pytest.fixture(scope="module")
def native(model: Path, logs: Path, asked: list[list[int]]) -> Iterator[list[list[int]]]:
    """Greedy tokens of SGLang's torch_native backend."""
    options = {
        "model_path": str(model),
        "attention_backend": "torch_native",
        "disable_radix_cache": True,
        "chunked_prefill_size": CONTEXT,
        "max_total_tokens": 49152,
        **COMMON,
    }
    with running(Engine("native", options, logs)) as engine:
        yield tokens(engine.generate(asked, max_new_tokens=NEW, ignore_eos=True))


def answers(
    engine: Engine, asked: list[list[int]], rules: list[dict[str, float]]
) -> list[dict[str, object]]:
    """Answers to all prompts, the rules taking turns."""
    sampling = [
        {
            "temperature": 0,
            "max_new_tokens": NEW,
            "ignore_eos": True,
            "custom_params": rules[index % len(rules)],
        }
        for index in range(len(asked))
    ]
    found: list[dict[str, object]] = engine.call(input_ids=asked, sampling_params=sampling)
    return found


def test_rules_that_read_everything(
    uncached: Engine, asked: list[list[int]], native: list[list[int]]
) -> None:
    """Coverage 1 on every prompt; delta 0 and policy dense take turns on a part of them."""
    got = answers(uncached, asked, EXACT[:1])
    assert tokens(got) == native
    assert {reads(answer)["bytes_fraction"] for answer in got} == {1.0}
    part = slice(None, None, 4)
    got = answers(uncached, asked[part], EXACT[1:])
    assert tokens(got) == native[part]
    assert {reads(answer)["bytes_fraction"] for answer in got} == {1.0}


def test_the_loop_itself_with_a_bound_near_zero(
    uncached: Engine, asked: list[list[int]], native: list[list[int]]
) -> None:
    """Scores, order, groups and merges all run; they just never leave anything out that counts."""
    got = answers(uncached, asked, TIGHT)
    assert tokens(got) == native
    looped = [
        reads(answer) for answer, ids in zip(got, asked, strict=True) if len(ids) >= MIN_CONTEXT
    ]
    assert len(looped) > 150
    assert all(found["rounds"] > 1 for found in looped)


def test_below_min_context_is_dense_bit_for_bit(uncached: Engine, prompts: Prompts) -> None:
    sampling = {"max_new_tokens": 24, "ignore_eos": True}
    for length in (5, 31, 100, MIN_CONTEXT - 30):
        ids = (
            prompts.recall(length, seed=6000 + length).ids
            if length > 99
            else prompts.filler(length, seed=6000 + length)
        )
        by_rule = []
        for rule in ({}, {"psa_policy": "dense"}):
            params = {"temperature": 0, "custom_params": rule, **sampling}
            answer = uncached.call(
                input_ids=[ids], sampling_params=[params], return_logprob=True, top_logprobs_num=5
            )[0]
            assert reads(answer)["bytes_fraction"] == 1.0
            assert reads(answer)["rounds"] == 0
            by_rule.append(answer["meta_info"]["output_top_logprobs"])
        assert by_rule[0] == by_rule[1]


def test_sparse_decode_is_not_dense(uncached: Engine, asked: list[list[int]]) -> None:
    """The comparisons above would prove nothing if the default rule read everything too."""
    got = answers(uncached, asked[-4:], [{}])
    assert all(reads(answer)["bytes_fraction"] < 0.5 for answer in got)
