"""A request's own rule: found wherever clients write it, checked before the request is queued.

The keys are ``psa_policy``, ``psa_stop``, ``psa_coverage``, ``psa_delta`` and ``psa_budget_pages``.
A client may put them

* among the sampling parameters, of ``/generate`` or of ``sgl.Engine.generate``;
* at the top level of a JSON body, which is where ``extra_body`` of an OpenAI client goes;
* into ``custom_params``, SGLang's own field for parameters it does not know, in either API.

They all end up in ``custom_params``, which SGLang carries to the scheduler. A rule that cannot be
used ends the request with HTTP 400 (``ValueError`` in ``sgl.Engine``) before any part of it runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from sgl_psa import static_plan
from sgl_psa.config import ConfigError
from sgl_psa.policies import POLICIES
from sgl_psa.rule import REQUEST_PREFIX, RequestRule
from sglang_psa import compat, graph_args
from sglang_psa.hooks import Hook, Kind
from sglang_psa.server_args import psa_config, uses_psa
from sglang_psa.token_ids import check_token_ids


def gather(params: Mapping[str, Any] | None, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``params`` with every psa key moved into its ``custom_params``; a new mapping if any moved.

    Args:
        params: sampling parameters of one request.
        body: psa keys of the request's JSON body.

    Raises:
        ConfigError: a key is given twice with different values, or ``custom_params`` is no object.
    """
    direct = _psa_keys(params)
    if not direct and not body:
        return params
    rest = {k: v for k, v in (params or {}).items() if k not in direct}
    custom = rest.get("custom_params") or {}
    if not isinstance(custom, Mapping):
        raise ConfigError(f"custom_params={custom!r}: expected an object of names and values")
    merged = dict(custom)
    for source in (direct, body):
        for key, value in source.items():
            if merged.setdefault(key, value) != value:
                raise ConfigError(
                    f"{key} is given twice, as {merged[key]!r} and as {value!r}: give it once"
                )
    return {**rest, "custom_params": merged}


def rule_of(manager: Any, params: Mapping[str, Any] | None) -> RequestRule:
    """The rule in force for sampling parameters that :func:`gather` returned.

    Args:
        manager: SGLang's tokenizer manager; its preferred sampling parameters apply where the
            request has none.
        params: sampling parameters of one request.

    Raises:
        ConfigError: naming the field, the value and what is allowed, or the nearest key.
    """
    effective = {**(manager.preferred_sampling_params or {}), **(params or {})}
    custom = effective.get("custom_params")
    config = psa_config(manager.server_args)
    rule = RequestRule.parse(custom if isinstance(custom, Mapping) else None, config)
    if graph_args.decode_graph(manager.server_args) != "disabled":
        static_plan.check_policy(POLICIES[rule.policy], REQUEST_PREFIX)
    return rule


def prepare(manager: Any, obj: Any, body: Mapping[str, Any]) -> None:
    """Gather and check the rules of a request or a batch; may be called again on its result.

    Args:
        manager: SGLang's tokenizer manager.
        obj: a request of SGLang's tokenizer manager; its ``sampling_params`` may be one mapping, a
            list of one a prompt, or ``None``.
        body: psa keys of the request's JSON body; they hold for the whole batch.

    Raises:
        ConfigError: as :func:`gather` and :func:`rule_of`, or for token ids out of range.
    """
    check_token_ids(manager, obj)
    params = getattr(obj, "sampling_params", None)
    if isinstance(params, list):
        obj.sampling_params = [gather(one, body) for one in params]
        for one in obj.sampling_params:
            rule_of(manager, one)
    else:
        obj.sampling_params = gather(params, body)
        rule_of(manager, obj.sampling_params)


async def body_keys(request: Any) -> dict[str, Any]:
    """The psa keys at the top level of an HTTP request's JSON body, else nothing.

    FastAPI has read the body by then, and the request keeps what it parsed.
    """
    headers = getattr(request, "headers", None)
    if headers is None or "json" not in headers.get("content-type", ""):
        return {}
    return _psa_keys(await request.json())


def _psa_keys(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {}
    return {k: v for k, v in values.items() if str(k).startswith(REQUEST_PREFIX)}


async def generate(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Around the one function that every request passes, in the process of the HTTP server."""
    if uses_psa(manager.server_args):
        prepare(manager, obj, await body_keys(request))
    async with aclosing(original(manager, obj, request)) as outputs:
        async for output in outputs:
            yield output


def refuse_before_stream(manager: Any, obj: Any) -> None:
    """Check a streaming ``/generate`` request while its HTTP status can still be 400.

    SGLang builds the stream's clean-up task before it sends the status, and starts the request
    after.
    """
    from fastapi import HTTPException

    if not uses_psa(manager.server_args):
        return
    try:
        prepare(manager, obj, {})
    except ConfigError as error:
        raise HTTPException(status_code=400, detail=str(error)) from None


HOOKS = (
    Hook("request rules", compat.GENERATE_REQUEST, generate, Kind.AROUND, "main"),
    Hook("streamed rules", compat.CREATE_ABORT_TASK, refuse_before_stream, Kind.BEFORE, "main"),
)
