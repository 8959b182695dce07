"""A request's rule and its share of the prefix cache.

The policy, in one place: KV that is decoded under sparse attention enters SGLang's prefix cache
like any other. A request that decodes by the server's default rule uses the default namespace; one
that asks for another rule gets a namespace of that rule (through the cache's extra key), so it
shares prefixes only with requests of the same rule and nobody reads what a laxer one wrote.
"""

from __future__ import annotations

from typing import Any

from sgl_psa.config import ConfigError
from sglang_psa import compat, state
from sglang_psa.hooks import Hook, Kind


def attach_rule(result: None, request: Any, *args: Any, **kwargs: Any) -> None:
    """Give a new request ``psa_rule`` and its namespace; end it if its rule cannot be used.

    The HTTP layer refuses bad rules before they come here; this is the last line for other ways
    in.
    """
    backend = state.get_backend()
    if backend is None:
        return
    params = request.sampling_params.custom_params
    try:
        rule = backend.parse_rule(params if isinstance(params, dict) else None)
    except ConfigError as error:
        request.psa_rule = backend.parse_rule(None)
        request.set_finish_with_abort(str(error))
        return
    request.psa_rule = rule
    namespace = rule.namespace(backend.config)
    if namespace is not None:
        request.extra_key = "|".join(filter(None, (request.extra_key, namespace)))


HOOKS = (Hook("rule of a request", compat.NEW_REQUEST, attach_rule, Kind.AFTER),)
