"""Fixtures of the kernel tests."""

from collections.abc import Iterator

import pytest
from sgl_psa_kernels._native import call
from sgl_psa_kernels._native.build import build_cached
from sgl_psa_kernels._native.isa import ISAS, supported
from sgl_psa_kernels._native.loader import open_library


@pytest.fixture(params=[isa.name for isa in ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per instruction set, with backend "cpu" bound to it."""
    by_name = {isa.name: isa for isa in supported()}
    if request.param not in by_name:
        pytest.skip(f"this CPU has no {request.param}")
    library = open_library(build_cached(by_name[request.param]))
    assert library.psa_isa().decode() == request.param
    monkeypatch.setattr(call, "load", lambda: library)
    yield request.param
