"""Bad requests get a clear message, hold nothing, and the next request is served."""

import json
from typing import Any

import pytest

from test.server.conftest import CONTEXT
from test.server.process import Server
from test.server.prompts import Prompts

pytestmark = pytest.mark.server

BAD_RULES: dict[str, tuple[dict[str, Any], str]] = {
    "coverage 0": ({"psa_coverage": 0}, "psa_coverage=0: expected a number > 0 and <= 1"),
    "coverage above 1": ({"psa_coverage": 1.01}, "psa_coverage=1.01: expected"),
    "coverage NaN": ({"psa_coverage": float("nan")}, "expected a JSON value"),
    "coverage NaN as text": ({"psa_coverage": "nan"}, "psa_coverage='nan': expected a number"),
    "coverage text": ({"psa_coverage": "most"}, "psa_coverage='most': expected"),
    "coverage boolean": ({"psa_coverage": True}, "psa_coverage=True: expected"),
    "delta 1": ({"psa_delta": 1}, "psa_delta=1: expected a number >= 0 and < 1"),
    "delta negative": ({"psa_delta": -0.1}, "psa_delta=-0.1: expected"),
    "unknown policy": ({"psa_policy": "quest"}, "psa_policy='quest': expected one of psa, dense"),
    "unknown stop": ({"psa_stop": "never"}, "psa_stop='never': expected one of"),
    "unknown key": ({"psa_covrage": 0.9}, "did you mean 'psa_coverage'"),
    "two knobs": ({"psa_coverage": 0.9, "psa_delta": 0.1}, "psa_stop"),
}


@pytest.fixture(autouse=True)
def next_request_is_served(server: Server) -> Any:
    yield
    server.wait_idle()
    assert len(server.generate([11, 12, 13], max_new_tokens=2)["output_ids"]) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BAD_RULES)
def test_bad_rule(server: Server, name: str, stream: bool) -> None:
    rule, message = BAD_RULES[name]
    body = {
        "input_ids": [5, 6, 7],
        "stream": stream,
        "sampling_params": {"max_new_tokens": 2, "custom_params": rule},
    }
    response = server.post("/generate", body)
    assert response.status_code == 400, response.text
    assert message in json.dumps(response.json()).replace("\\u003e", ">"), response.text


@pytest.mark.parametrize("place", ["sampling_params", "body"])
def test_bad_rule_in_any_place(server: Server, place: str) -> None:
    body: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}}
    (body if place == "body" else body["sampling_params"])["psa_coverage"] = 7
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert "psa_coverage=7" in response.text


@pytest.mark.parametrize("prompt", [{"text": ""}, {"input_ids": []}, {"text": [""]}, {}], ids=repr)
def test_empty_prompt(server: Server, prompt: dict[str, Any]) -> None:
    """SGLang refuses a request without tokens, or answers it from the model's first token."""
    response = server.post("/generate", {**prompt, "sampling_params": {"max_new_tokens": 2}})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert len(response.json()["error"]["message"]) > 10


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ids", [[5, 10**6], [-3], [[5], [6, 10**6]]], ids=str)
def test_token_ids_that_the_model_does_not_have(
    server: Server, ids: list[Any], stream: bool
) -> None:
    body = {"input_ids": ids, "stream": stream, "sampling_params": {"max_new_tokens": 2}}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert "is no token of this model, ids are 0 to" in response.text


def test_prompt_longer_than_the_context(server: Server, prompts: Prompts) -> None:
    ids = prompts.filler(CONTEXT + 1, seed=9000)
    response = server.post("/generate", {"input_ids": ids, "sampling_params": {}})
    assert response.status_code == 400
    assert "longer than the model's context length" in response.text
    assert server.load()["num_used_tokens"] == 0


def test_answer_beyond_the_context(server: Server, prompts: Prompts) -> None:
    """The answer ends at the end of the context, or the request is refused; nothing is cut off."""
    ids = prompts.filler(CONTEXT - 20, seed=9100)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
    response = server.post("/generate", body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 200:
        answer = response.json()["meta_info"]
        assert answer["finish_reason"]["type"] == "length"
        assert answer["prompt_tokens"] == len(ids)
        assert answer["prompt_tokens"] + answer["completion_tokens"] <= CONTEXT


@pytest.mark.parametrize("body", ["{", "[]", '{"text": 5}', '{"text": "a", "sampling_params": 3}'])
def test_malformed_body(server: Server, body: str) -> None:
    response = server.post("/generate", body)
    assert 400 <= response.status_code < 500, response.text


def test_client_that_leaves_in_mid_stream(server: Server, prompts: Prompts) -> None:
    """Its pages come back, without waiting for the end of the answer."""
    streams = [
        server.stream(prompts.filler(600, seed=9200 + n), max_new_tokens=4000, ignore_eos=True)
        for n in range(3)
    ]
    for stream in streams:
        next(stream)
    assert server.load()["num_running_reqs"] == 3
    for stream in streams:
        stream.close()
    server.wait_idle(30)
    server.assert_no_leak()
