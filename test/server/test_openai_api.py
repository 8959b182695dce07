"""The OpenAI client on a psa server."""

from collections.abc import Iterator

import openai
import pytest

from test.server.process import Server
from test.server.prompts import Prompts, Recall

pytestmark = pytest.mark.server

MODEL = "recall"
GREEDY = {"model": MODEL, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def asked(prompts: Prompts) -> Recall:
    return prompts.recall(700, seed=2000)


def test_completion(client: openai.OpenAI, asked: Recall) -> None:
    answer = client.completions.create(prompt=asked.text, **GREEDY)
    assert answer.usage is not None and answer.usage.prompt_tokens > 600
    psa = answer.metadata["psa"]
    assert psa["policy"] == "psa"
    assert 0 < psa["bytes_fraction"] < 1
    text = ""
    for event in client.completions.create(prompt=asked.text, stream=True, **GREEDY):
        text += event.choices[0].text if event.choices else ""
    assert text == answer.choices[0].text


def test_chat(client: openai.OpenAI, asked: Recall) -> None:
    messages = [{"role": "user", "content": asked.text}]
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    assert 0 < answer.metadata["psa"]["bytes_fraction"] < 1
    parts, usage = [], None
    for event in client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
    ):
        parts += [choice.delta.content or "" for choice in event.choices]
        usage = event.usage or usage
    assert "".join(parts) == answer.choices[0].message.content
    assert usage.completion_tokens == answer.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 600


def test_rule_in_extra_body(client: openai.OpenAI, asked: Recall) -> None:
    for body in ({"psa_policy": "dense"}, {"custom_params": {"psa_policy": "dense"}}):
        answer = client.completions.create(prompt=asked.text, extra_body=body, **GREEDY)
        assert answer.metadata["psa"]["policy"] == "dense"
        assert answer.metadata["psa"]["bytes_fraction"] == 1
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": asked.text}],
        extra_body={"psa_coverage": 0.8},
        **GREEDY,
    )
    assert answer.metadata["psa"]["stop"] == "coverage"
    assert answer.metadata["psa"]["knob"] == 0.8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_bad_rule_is_a_bad_request(
    client: openai.OpenAI, asked: Recall, chat: bool, stream: bool
) -> None:
    if chat:
        messages = [{"role": "user", "content": asked.text}]
        create, prompt = client.chat.completions.create, {"messages": messages}
    else:
        create, prompt = client.completions.create, {"prompt": asked.text}
    expected = openai.APIError if stream else openai.BadRequestError
    with pytest.raises(expected, match=r"psa_coverage=1\.5: expected"):
        answer = create(stream=stream, extra_body={"psa_coverage": 1.5}, **prompt, **GREEDY)
        if stream:
            list(answer)
    good = create(**prompt, **GREEDY)
    assert good.usage.completion_tokens > 0
