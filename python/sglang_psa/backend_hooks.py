"""The name ``psa`` in SGLang's table of attention backends, and the way of rules to the backend."""

from __future__ import annotations

from typing import Any

from sglang_psa import compat, prefix_budgets, state
from sglang_psa.hooks import Hook, Kind


def register() -> None:
    """Register the backend; its modules are imported when SGLang builds it."""
    compat.register_attention_backend("psa")(_create)


def _create(runner: Any) -> Any:
    from sglang_psa.attention_backend import PSAAttentionBackend

    return PSAAttentionBackend(runner)


def store_rules(forward_batch: Any, cls: type, batch: Any, runner: Any, **kwargs: Any) -> None:
    """Put the rules of the batch's requests into the table that decode steps read.

    The table is indexed by request slot: attributes of a forward batch do not survive, SGLang
    rebuilds it on the way to the backend.
    """
    backend = state.get_backend()
    if backend is None:
        return
    for request in batch.reqs or ():
        rule = getattr(request, "psa_rule", None)
        if rule is not None and request.req_pool_idx is not None:
            slot = int(request.req_pool_idx)
            new = backend.rules.set(slot, rule)
            prefix_budgets.follow(backend, batch, request, slot, new)


HOOKS = (Hook("rules of the batch", compat.NEW_FORWARD_BATCH, store_rules, Kind.AFTER),)
