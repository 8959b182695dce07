"""Binding of the C++ kernels."""

from typing import Any

from sgl_psa_kernels._native import load


def write(*args: Any, **kwargs: Any) -> Any:
    load()
    raise NotImplementedError


def score(*args: Any, **kwargs: Any) -> Any:
    load()
    raise NotImplementedError
