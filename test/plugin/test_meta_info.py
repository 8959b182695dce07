"""What a request read: from the rows of decode steps to one dictionary a response."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_psa import meta_info, state
from sglang_psa.meta_info import RequestReads, add_metadata, publish, row_sums, summarise

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.stats import NUM_COLUMNS, ROUNDS, ByteCost, StepStats, step_stats

CONFIG = PSAConfig()
RULE = RequestRule.parse({"psa_coverage": 0.9}, CONFIG)
LAYERS, HEADS, PAGE = 3, 2, 16


def a_step(
    seq_lens: list[int], pages: list[int], coverage: float = 0.5, stopped: int = 0
) -> StepStats:
    """Rows that attended ``pages`` full pages in every layer and head, after two rounds. A
    stop rule ended reading in the first ``stopped`` rows.
    """
    columns = torch.zeros(LAYERS, len(seq_lens), HEADS, NUM_COLUMNS)
    for row, n in enumerate(pages):
        columns[:, row] = torch.tensor([n, n * PAGE, 1, 2, coverage, 0])
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    stops = torch.arange(len(seq_lens)) < stopped
    cost = ByteCost(token=8, scored_page=16)
    return step_stats(columns, lens, len(seq_lens), PAGE, cost, columns[..., 2] * 16, stops)


def reads(*tokens: Any) -> dict[str, Any]:
    request = RequestReads(RULE, "sketch")
    request.take(tokens)
    return request.as_dict()


def test_rows_of_a_step_keep_to_their_requests() -> None:
    first, second = row_sums(a_step([160, 320], [5, 5]), 2)
    assert reads(None, first)["pages_fraction"] == pytest.approx(5 / 10)
    assert reads(None, second)["pages_fraction"] == pytest.approx(5 / 20)


def test_the_share_of_one_round_is_of_reads_that_a_stop_rule_ended() -> None:
    step = a_step([160, 160], [5, 5], stopped=1)
    first, second = row_sums(step, 2)
    assert reads(None, first)["one_round"] == 0
    assert reads(None, second)["one_round"] is reads(None)["one_round"] is None
    columns = torch.zeros(LAYERS, 1, HEADS, NUM_COLUMNS)
    columns[1:, ..., ROUNDS] = torch.tensor([1.0, 2.0])
    lens, stops = torch.tensor([160], dtype=torch.int32), torch.tensor([True])
    (row,) = row_sums(step_stats(columns, lens, 1, PAGE, ByteCost(8, 16), stops=stops), 1)
    assert reads(None, row)["one_round"] == pytest.approx((LAYERS + 1) / (2 * LAYERS))
    assert reads(None, first, row)["one_round"] == pytest.approx((LAYERS + 1) / (4 * LAYERS))


def test_prefill_rows_are_empty() -> None:
    assert row_sums(None, 3) == [None, None, None]


def test_a_request_is_summed_over_its_steps() -> None:
    small, large = row_sums(a_step([160, 640], [10, 10], 1.0), 2)
    total = reads(None, small, large)
    assert total["decode_steps"] == 2
    assert total["pages_attended"] == 20 * LAYERS * HEADS
    assert total["pages_fraction"] == pytest.approx(20 / 50)
    scored = 2 * 16
    assert total["bytes_fraction"] == pytest.approx((2 * 160 * 8 + scored) / ((160 + 640) * 8))
    assert total["coverage"] == pytest.approx(1.0)
    assert total["rounds"] == pytest.approx(2.0)


def test_a_request_that_ended_in_prefill_has_no_fractions() -> None:
    total = reads(None)
    assert total["decode_steps"] == 0
    assert total["pages_fraction"] is total["bytes_fraction"] is None
    assert total["coverage"] is total["rounds"] is None
    assert total["policy"] == "psa"
    assert total["scorer"] == "sketch"


def test_the_rule_of_the_request_is_named() -> None:
    total = reads()
    assert (total["policy"], total["stop"], total["knob"]) == ("psa", "coverage", 0.9)


def test_a_policy_without_scores_has_a_budget_and_no_coverage() -> None:
    rule = RequestRule.parse({"psa_policy": "window", "psa_budget_pages": 12}, CONFIG)
    request = RequestReads(rule, "sketch")
    request.take([None, *row_sums(a_step([160], [5], coverage=float("nan")), 1)])
    total = request.as_dict()
    assert (total["policy"], total["stop"], total["knob"]) == ("window", "budget", 12)
    assert total["coverage"] is None and total["pages_fraction"] == pytest.approx(0.5)


def test_retraction_does_not_lose_or_double_steps() -> None:
    (step,) = row_sums(a_step([160], [5]), 1)
    request = RequestReads(RULE, "sketch")
    tokens: list[Any] = [None, step, step]
    request.take(tokens)
    tokens += [None, step]
    request.take(tokens)
    assert request.as_dict()["decode_steps"] == 3


def test_each_token_is_taken_once() -> None:
    (step,) = row_sums(a_step([160], [5]), 1)
    request = RequestReads(RULE, "sketch")
    tokens = [None, step]
    for _ in range(3):
        request.take(tokens)
    assert request.as_dict()["decode_steps"] == 1


def manager(backend: str = "psa") -> SimpleNamespace:
    settings = {f"psa_{k}": v for k, v in CONFIG.as_dict().items()}
    args = SimpleNamespace(
        attention_backend=backend,
        prefill_attention_backend=None,
        decode_attention_backend=None,
        **settings,
    )
    return SimpleNamespace(server_args=args, preferred_sampling_params=None, rid_to_state={})


def respond(manager: Any, chunks: list[list[Any]], aborted: bool = False) -> list[Any]:
    """``meta_info["psa"]`` of each output of a request whose tokens arrive in ``chunks``."""
    tokens: dict[str, list[Any]] = {}
    manager.rid_to_state["r"] = SimpleNamespace(customized_info_accumulated=tokens)
    obj = SimpleNamespace(rid="r", stream=True, sampling_params={})

    async def original(manager: Any, obj: Any, request: Any) -> Any:
        for chunk in chunks:
            tokens.setdefault("psa", []).extend(chunk)
            del manager.rid_to_state["r"]
            yield {"meta_info": {"id": "r", "psa": tokens["psa"]}}
            manager.rid_to_state["r"] = None
        if aborted:
            yield {"meta_info": {"id": "r", "finish_reason": {"type": "abort"}}}

    async def collect() -> list[Any]:
        found = summarise(original, manager, obj)
        return [output["meta_info"].get("psa") async for output in found]

    return asyncio.run(collect())


def test_every_chunk_of_a_stream_has_the_value_so_far() -> None:
    (step,) = row_sums(a_step([160], [5]), 1)
    outputs = respond(manager(), [[None], [step], [step, step]])
    assert [out["decode_steps"] for out in outputs] == [0, 1, 3]
    assert outputs[0]["bytes_fraction"] is None
    assert outputs[2]["pages_fraction"] == pytest.approx(0.5)


def test_an_aborted_request_has_its_dictionary() -> None:
    (step,) = row_sums(a_step([160], [5]), 1)
    assert respond(manager(), [[None, step]], aborted=True)[-1]["decode_steps"] == 1
    assert respond(manager(), [], aborted=True)[-1]["decode_steps"] == 0


def test_a_dense_server_has_no_psa_key() -> None:
    untouched = ["psa"]
    tokens = respond(manager("torch_native"), [untouched])
    assert tokens == [untouched]


def forward(monkeypatch: pytest.MonkeyPatch, step: StepStats | None) -> tuple[Any, Any]:
    steps = [step]
    backend = SimpleNamespace(take_step=steps.pop)
    seen: list[Any] = []
    monkeypatch.setattr(state, "get_backend", lambda: backend)
    monkeypatch.setattr(meta_info.metrics, "observe", seen.append)
    logits = SimpleNamespace(customized_info={"other": [1, 2]})
    publish(SimpleNamespace(logits_output=logits), None, SimpleNamespace(batch_size=2))
    assert not steps, "the next forward would publish this step again"
    return logits.customized_info, seen


def test_a_decode_step_is_published_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = a_step([160, 160], [5, 10])
    info, seen = forward(monkeypatch, step)
    assert info["other"] == [1, 2]
    assert len(info["psa"]) == 2
    assert seen == [step]


def test_prefill_publishes_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    info, seen = forward(monkeypatch, None)
    assert info["psa"] == [None, None]
    assert seen == []


def test_without_the_backend_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "get_backend", lambda: None)
    logits = SimpleNamespace(customized_info=None)
    publish(SimpleNamespace(logits_output=logits), None, SimpleNamespace(batch_size=2))
    assert logits.customized_info is None


def test_openai_responses_carry_it_in_metadata() -> None:
    one, two = {"meta_info": {"psa": {"a": 1}}}, {"meta_info": {"psa": {"a": 2}}}
    response = SimpleNamespace(metadata={"weight_version": "default"})
    add_metadata(response, None, None, [one])
    assert response.metadata == {"weight_version": "default", "psa": {"a": 1}}
    add_metadata(response, None, None, [one, two])
    assert response.metadata["psa"] == [{"a": 1}, {"a": 2}]


def test_openai_responses_of_a_dense_server_are_unchanged() -> None:
    response = SimpleNamespace(metadata={"weight_version": "default"})
    add_metadata(response, None, None, [{"meta_info": {}}])
    assert response.metadata == {"weight_version": "default"}
    add_metadata(SimpleNamespace(), None, None, [{"meta_info": {"psa": {}}}])
