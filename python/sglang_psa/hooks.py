"""Hooks into SGLang: declared as data, registered together, and proven to have taken.

SGLang's registry logs and ignores a hook whose target does not exist, and the server then runs
without it. :func:`verify` turns that into an error; it is called where an exception stops the
start: from the server-argument check in the main process, from the backend in the scheduler.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sglang_psa import compat


class Kind(Enum):
    """How a hook meets its target; the values are SGLang's own names."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


@dataclass(frozen=True)
class Hook:
    """One hook.

    Attributes:
        name: what it is for; appears in the error when it did not take.
        target: dotted path of the function, method or class.
        function: BEFORE ``fn(*a, **k) -> (a, k) | None``; AFTER ``fn(result, *a, **k) -> new |
            None``; AROUND ``fn(original, *a, **k)``; REPLACE a function or class.
        kind: which of the four.
        process: ``main``, ``scheduler`` or ``any``.
    """

    name: str
    target: str
    function: Callable[..., Any]
    kind: Kind
    process: str = "scheduler"


class HookNotApplied(RuntimeError):
    """A hook that the psa backend needs is not in place."""


_installed: list[Hook] = []


def install(hooks: Iterable[Hook]) -> None:
    """Register with SGLang the hooks that this process needs; call once a process."""
    kinds = compat.process_kinds()
    registry, hook_type = compat.HookRegistry, compat.HookType
    for hook in hooks:
        if hook.process == "any" or hook.process in kinds:
            registry.register(hook.target, hook.function, hook_type(hook.kind.value))
            _installed.append(hook)


def installed() -> tuple[Hook, ...]:
    """The hooks that this process registered."""
    return tuple(_installed)


def verify(hooks: Iterable[Hook] | None = None) -> None:
    """Check that every hook really wraps its target.

    Args:
        hooks: the hooks to check; ``None`` means all that this process registered.

    Raises:
        HookNotApplied: nothing is registered, or a target is missing or not wrapped. The message
            names the hook, the target and the SGLang version.
    """
    to_check = installed() if hooks is None else tuple(hooks)
    if not to_check:
        raise HookNotApplied(
            "sgl-psa registered no hooks in this process: SGLang did not load its plugin. "
            "Unset SGLANG_PLUGINS and SGLANG_PLATFORM, or add sgl_psa and sgl_psa_cpu to them; "
            "start tools that load plugins too late with `python -m sglang_psa.run MODULE ...`"
        )
    patched = compat.HookRegistry._patched
    for hook in to_check:
        problem = None
        if hook.target not in patched:
            problem = "SGLang did not apply it (its log says why)"
        else:
            try:
                owner, _, attribute = hook.target.rpartition(".")
                current = getattr(pkgutil.resolve_name(owner), attribute)
            except (ImportError, AttributeError, ValueError) as error:
                problem = f"the target cannot be resolved: {error}"
            else:
                if not _wraps(current, hook.function):
                    problem = "something replaced the target after it"
        if problem:
            raise HookNotApplied(
                f"sgl-psa hook {hook.name!r} on {hook.target} is not in place with SGLang "
                f"{compat.sglang_version()}: {problem}. Install sglang {compat.tested_range()}, "
                "or serve without --attention-backend psa"
            )


def _wraps(current: Any, function: Callable[..., Any]) -> bool:
    """Whether ``function`` is ``current`` or is held by a wrapper around it."""
    seen: Any = getattr(current, "__func__", current)
    while seen is not None:
        if seen is function:
            return True
        if any(_content(cell) is function for cell in getattr(seen, "__closure__", None) or ()):
            return True
        seen = getattr(seen, "__wrapped__", None)
    return False


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
