"""Entry point of the ``sglang.srt.plugins`` group: registers, and does nothing on import.

A feature is a module of this package with ``HOOKS``, a tuple of :class:`sglang_psa.hooks.Hook`,
and optionally ``register()`` for what is not a hook. To add one, add its name to ``FEATURES``.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from sglang_psa import state

logger = logging.getLogger(__name__)

FEATURES = (
    "server_args",
    "platform_hooks",
    "pool_hooks",
    "tiered_capacity",
    "backend_hooks",
    "radix",
    "prefix_budgets",
    "request_rules",
    "meta_info",
    "metrics",
    "routes",
    "admission",
)


def register() -> None:
    """Register names and hooks with SGLang; called by SGLang once a process.

    Never raises: SGLang would only log it. A failure is kept in :mod:`sglang_psa.state` and raised
    by the start-up check of a server that asks for the psa backend; any other server is not
    concerned.
    """
    try:
        _register()
    except Exception as error:
        state.registration_error = error
        logger.warning("sgl-psa is not available: %s", error)
        _refuse_psa(error)


def _register() -> None:
    from sglang_psa import compat, hooks

    compat.check_version()
    features = [importlib.import_module(f"sglang_psa.{name}") for name in FEATURES]
    found = [hook for feature in features for hook in getattr(feature, "HOOKS", ())]
    for feature in features:
        setup = getattr(feature, "register", None)
        if setup is not None:
            setup()
    hooks.install(found)


def _refuse_psa(error: Exception) -> None:
    """Keep ``psa`` a known backend name whose choice fails with the reason."""
    from sglang_psa import compat

    reason = f"--attention-backend psa: {error}"

    def refuse_arguments(result: object, server_args: Any) -> None:
        if "psa" in server_args.get_attention_backends():
            raise RuntimeError(reason) from error

    def refuse_backend(runner: object) -> None:
        raise RuntimeError(reason) from error

    if "psa" not in compat.attention_backend_choices:
        compat.add_attention_backend_choices(["psa"])
    compat.register_attention_backend("psa")(refuse_backend)
    compat.HookRegistry.register(compat.CHECK_SERVER_ARGS, refuse_arguments, compat.HookType.AFTER)
