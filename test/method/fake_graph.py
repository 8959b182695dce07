"""A CUDA graph for the CPU: records operations on tensors, and replays them on the same tensors.

Nothing of Python between two operations runs again, so what a step computes on the host while it is
captured is frozen, as in a real graph; what must wait for the device raises, as there. Triton
kernels in the interpreter are recorded as whole launches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Parts of names of operators whose result or shape the host must wait for.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class NoWait(TorchDispatchMode):
    """Fails on operators that wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name == "not_equal" or not any(wait in name for wait in WAITS), name
        return func(*args, **(kwargs or {}))


class FakeGraph(NoWait):
    """``with graph:`` captures, ``graph.replay()`` runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._launching:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.overloadpacket.__name__.startswith("empty"):
            self._steps.append(lambda: _again(func, args, kwargs, out))
        return out

    def __enter__(self):
        self._patch = _recorded_launches(self)
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.__exit__(None, None, None)
        return super().__exit__(*error)

    def replay(self) -> None:
        """Run what was captured, in place."""
        for step in self._steps:
            step()


def _again(func: Any, args: Any, kwargs: Any, old: Any) -> None:
    new = func(*args, **kwargs)
    for a, b in zip(_tensors(old), _tensors(new), strict=True):
        if a.data_ptr() != b.data_ptr():
            a.copy_(b)


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for t in x if isinstance(t, torch.Tensor)] if isinstance(x, (list, tuple)) else []


@contextmanager
def _recorded_launches(graph: FakeGraph) -> Iterator[None]:
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    launch = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        graph._launching = True
        launch(self, *args, **kwargs)
        graph._launching = False
        graph._steps.append(lambda: launch(self, *args, **kwargs))

    interpreter.GridExecutor.__call__ = recorded
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = launch
