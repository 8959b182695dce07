"""Rules of requests: where clients may write them, what is refused, who is left alone."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_psa import request_rules
from sglang_psa.request_rules import (
    body_keys,
    gather,
    generate,
    prepare,
    refuse_before_stream,
    rule_of,
)

from sgl_psa.config import ConfigError, PSAConfig

SETTINGS = {f"psa_{k}": v for k, v in PSAConfig().as_dict().items()}


def manager(backend: str = "psa", preferred: dict[str, Any] | None = None) -> SimpleNamespace:
    args = SimpleNamespace(
        attention_backend=backend,
        prefill_attention_backend=None,
        decode_attention_backend=None,
        **SETTINGS,
    )
    return SimpleNamespace(server_args=args, preferred_sampling_params=preferred)


def http_request(body: Any, content_type: str = "application/json") -> SimpleNamespace:
    async def json() -> Any:
        return body

    return SimpleNamespace(headers={"content-type": content_type}, json=json)


def run(manager: Any, obj: Any, request: Any = None) -> tuple[list[Any], list[Any]]:
    """Outputs, and the requests that reached SGLang."""
    reached = []

    async def original(manager: Any, obj: Any, request: Any) -> Any:
        reached.append(obj)
        yield "first"
        yield "second"

    async def collect() -> list[Any]:
        return [out async for out in generate(original, manager, obj, request)]

    return asyncio.run(collect()), reached


def test_keys_among_the_sampling_parameters_move() -> None:
    given = {"max_new_tokens": 8, "psa_coverage": 0.9, "custom_params": {"mine": 1}}
    before = {**given, "custom_params": dict(given["custom_params"])}
    assert gather(given, {}) == {
        "max_new_tokens": 8,
        "custom_params": {"mine": 1, "psa_coverage": 0.9},
    }
    assert given == before, "the caller's dictionary was changed"


def test_parameters_without_keys_are_the_same_object() -> None:
    for params in ({"max_new_tokens": 8}, {"custom_params": {"psa_delta": 0.1}}, {}, None):
        assert gather(params, {}) is params


def test_body_keys_join_custom_params() -> None:
    gathered = gather({"custom_params": {"psa_stop": "coverage"}}, {"psa_coverage": 0.5})
    assert gathered == {"custom_params": {"psa_stop": "coverage", "psa_coverage": 0.5}}
    assert gather(None, {"psa_coverage": 0.5}) == {"custom_params": {"psa_coverage": 0.5}}


def test_a_key_given_twice_must_agree() -> None:
    params = {"psa_coverage": 0.9, "custom_params": {"psa_coverage": 0.8}}
    with pytest.raises(ConfigError, match=r"psa_coverage is given twice, as 0\.8 and as 0\.9"):
        gather(params, {})
    same = {"psa_coverage": 0.9, "custom_params": {"psa_coverage": 0.9}}
    assert gather(same, {"psa_coverage": 0.9}) == {"custom_params": {"psa_coverage": 0.9}}


def test_custom_params_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match="custom_params="):
        gather({"psa_coverage": 0.9, "custom_params": [1]}, {})


def test_a_batch_has_its_own_rules_and_none_runs_if_one_is_bad() -> None:
    obj = SimpleNamespace(sampling_params=[{"psa_coverage": 0.5}, {}, {"psa_policy": "dense"}])
    prepare(manager(), obj, {})
    rules = [rule_of(manager(), one) for one in obj.sampling_params]
    assert [r.stop for r in rules] == ["coverage", "marginal", "marginal"]
    assert [r.policy for r in rules] == ["psa", "psa", "dense"]
    bad = SimpleNamespace(sampling_params=[{}, {"psa_coverage": 2}])
    with pytest.raises(ConfigError, match="psa_coverage=2"):
        run(manager(), bad)


def test_a_refused_request_never_reaches_sglang() -> None:
    outputs, reached = run(manager(), SimpleNamespace(sampling_params={"psa_coverage": 0.5}))
    assert outputs == ["first", "second"]
    assert reached[0].sampling_params == {"custom_params": {"psa_coverage": 0.5}}

    async def original(*args: Any) -> Any:
        raise AssertionError("reached")
        yield

    async def first() -> Any:
        obj = SimpleNamespace(sampling_params={"psa_coverge": 0.5})
        return await generate(original, manager(), obj).__anext__()

    with pytest.raises(ConfigError, match="did you mean 'psa_coverage'"):
        asyncio.run(first())


def test_top_level_keys_of_a_json_body_count() -> None:
    obj = SimpleNamespace(sampling_params={"max_new_tokens": 4})
    run(manager(), obj, http_request({"prompt": "x", "psa_delta": 0.25}))
    assert rule_of(manager(), obj.sampling_params).delta == 0.25
    with pytest.raises(ConfigError, match="psa_polcy"):
        run(manager(), SimpleNamespace(sampling_params={}), http_request({"psa_polcy": "dense"}))


@pytest.mark.parametrize(
    "request_",
    [
        None,
        SimpleNamespace(),
        http_request([{"psa_delta": 1}]),
        http_request({"psa_delta": 0.5}, "multipart/form-data"),
    ],
)
def test_requests_without_a_json_object_have_no_keys(request_: Any) -> None:
    assert asyncio.run(body_keys(request_)) == {}


def test_a_dense_server_leaves_requests_alone() -> None:
    params = {"psa_coverage": 7}
    obj = SimpleNamespace(sampling_params=params)
    outputs, _ = run(manager("torch_native"), obj, http_request({"psa_nonsense": 1}))
    assert outputs == ["first", "second"]
    assert obj.sampling_params is params
    refuse_before_stream(manager("torch_native"), obj)


def test_preferred_sampling_parameters_apply_where_the_request_has_none() -> None:
    prefers = manager(preferred={"custom_params": {"psa_policy": "dense"}})
    assert rule_of(prefers, {}).policy == "dense"
    assert rule_of(prefers, None).policy == "dense"
    assert rule_of(prefers, {"custom_params": {"psa_delta": 0.5}}).policy == "psa"


def test_a_bad_rule_of_a_stream_has_http_status_400() -> None:
    from fastapi import HTTPException

    with pytest.raises(HTTPException) as caught:
        refuse_before_stream(manager(), SimpleNamespace(sampling_params={"psa_stop": "soon"}))
    assert caught.value.status_code == 400
    assert "psa_stop='soon'" in caught.value.detail
    assert "marginal, coverage" in caught.value.detail


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"psa_policy": "oracle_top_p"}, "--psa-scorer exact"),
        ({"psa_policy": "window", "psa_budget_pages": 1}, "set psa_budget_pages to 3"),
        ({"psa_budget_pages": 9}, "no effect on policy psa"),
    ],
)
def test_what_this_server_cannot_do_has_http_status_400(asked: dict[str, Any], words: str) -> None:
    from fastapi import HTTPException

    with pytest.raises(HTTPException) as caught:
        refuse_before_stream(manager(), SimpleNamespace(sampling_params=asked))
    assert caught.value.status_code == 400 and words in caught.value.detail


def test_closing_the_output_closes_sglangs_generator() -> None:
    closed = []

    async def original(*args: Any) -> Any:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def take_one() -> None:
        outputs = generate(original, manager(), SimpleNamespace(sampling_params=None))
        assert await outputs.__anext__() == 1
        await outputs.aclose()  # type: ignore[attr-defined]
        assert closed == [True]

    asyncio.run(take_one())


def test_hooks_stay_in_the_process_of_the_http_server() -> None:
    assert {hook.process for hook in request_rules.HOOKS} == {"main"}
