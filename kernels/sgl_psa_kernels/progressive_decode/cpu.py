"""Binding of the C++ kernels."""

from typing import Any

from sgl_psa_kernels._native import load


def progressive_decode(*args: Any, **kwargs: Any) -> Any:
    load()
    raise NotImplementedError
