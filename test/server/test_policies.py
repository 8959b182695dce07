"""Selection policies that requests choose on a running server, alone and side by side."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sgl_psa.config import PSAConfig
from sgl_psa.policies import legal
from test.server.compare import reads
from test.server.conftest import PAGE
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

NEW, BUDGET, LENGTH = 9, 12, 1500
#: Policy -> its knob, and what ends reading.
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "psa": ({"psa_delta": 0.2}, "marginal"),
    "dense": ({}, "marginal"),
    "topk": ({"psa_budget_pages": BUDGET}, "budget"),
    "window": ({"psa_budget_pages": BUDGET}, "budget"),
    "swa": ({"psa_budget_pages": BUDGET}, "budget"),
    "top_p": ({"psa_coverage": 0.8}, "coverage"),
}


@pytest.fixture(scope="module")
def heads(model: Path) -> int:
    """KV heads of all layers together."""
    config = json.loads((model / "config.json").read_text())
    return int(config["num_hidden_layers"] * config["num_key_value_heads"])


def ask(server: Server, ids: list[int], policy: str) -> dict[str, Any]:
    params = {"psa_policy": policy, **ASKED[policy][0]}
    return server.generate(ids, max_new_tokens=NEW, ignore_eos=True, custom_params=params)


def check(answer: dict[str, Any], policy: str, tokens: int, heads: int) -> None:
    """``meta_info`` says what was asked for and what it came to."""
    psa = reads(answer)
    knob, limit = ASKED[policy]
    assert (psa["policy"], psa["stop"]) == (policy, limit)
    assert psa["knob"] in (knob.values() or [PSAConfig().delta])
    assert psa["decode_steps"] == NEW - 1 and psa["stale_pages"] == 0
    pages = [-(-(tokens + step) // PAGE) for step in range(1, NEW)]
    assert psa["pages_total"] == heads * sum(pages)
    if policy == "dense":
        assert psa["pages_fraction"] == psa["bytes_fraction"] == 1
    elif limit == "budget":
        # swa reads everything once, in place of the prompt's sums.
        first = pages[0] if policy == "swa" else BUDGET
        assert psa["pages_attended"] == heads * (first + BUDGET * (NEW - 2))
    else:
        assert 0 < psa["pages_fraction"] < 1
    assert (psa["coverage"] is None) == (policy in ("window", "swa"))


@pytest.mark.parametrize("policy", ASKED)
def test_a_request_chooses_its_policy(
    server: Server, prompts: Prompts, heads: int, policy: str
) -> None:
    ids = prompts.filler(LENGTH, seed=9700)
    check(ask(server, ids, policy), policy, len(ids), heads)


def test_policies_run_side_by_side(server: Server, prompts: Prompts, heads: int) -> None:
    """Three requests a policy at once: slots and batches are shared, selections are not."""
    work = [
        (policy, prompts.filler(LENGTH + 40 * n, seed=9800 + n))
        for n in range(3)
        for policy in ASKED
    ]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda item: ask(server, item[1], item[0]), work))
    for (policy, ids), answer in zip(work, answers, strict=True):
        check(answer, policy, len(ids), heads)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"psa_policy": "oracle_top_p"}, "start the server with --psa-scorer exact"),
        ({"psa_policy": "topk", "psa_budget_pages": 2}, "set psa_budget_pages to 3 or more"),
        ({"psa_policy": "swa", "psa_coverage": 0.9}, "no effect on policy swa"),
    ],
)
def test_what_the_server_cannot_do_is_refused(
    server: Server, asked: dict[str, Any], message: str
) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, **asked}}
    response = server.post("/generate", body)
    assert response.status_code == 400 and message in response.text


def test_the_scorer_in_force_is_named(server: Server) -> None:
    assert server.stats()["config"]["scorer"] == legal.DEFAULT_SCORER
    assert server.get("/server_info").json()["psa_scorer"] == legal.DEFAULT_SCORER
