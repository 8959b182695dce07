"""Backends under test: the reference always, the C++ kernels where they can be built."""

import pytest
from sgl_psa_kernels._native import native_available

AVAILABLE, REASON = native_available()


@pytest.fixture(params=["reference", "torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not AVAILABLE:
        pytest.skip(f"C++ kernels cannot be built: {REASON}")
    return request.param
