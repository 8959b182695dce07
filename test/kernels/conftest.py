"""Fixtures of the kernel tests."""

from collections.abc import Iterator

import pytest
import torch
from sgl_psa_kernels._native import call
from sgl_psa_kernels._native.build import build_cached
from sgl_psa_kernels._native.isa import ISAS, supported
from sgl_psa_kernels._native.loader import open_library


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other. The tests of threads set their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Differ from avx512 in the products of codes with queries, and in nothing else.
_SCORES_ONLY = ("avx512vbmi", "avx512vnni")
_DISTINCT = [isa.name for isa in ISAS if isa.name not in _SCORES_ONLY]


@pytest.fixture(params=[*(f"cpu-{name}" for name in _DISTINCT), "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation but the reference: "cpu" once per instruction set, and "torch"."""
    return implementation(request.param, monkeypatch)


@pytest.fixture(params=[*(f"cpu-{isa.name}" for isa in ISAS), "torch"])
def sketch_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As ``backend``, with the instruction sets that differ in scoring sketches only."""
    return implementation(request.param, monkeypatch)


def implementation(param: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of "torch" or "cpu-ISA"."""
    name, _, instructions = param.partition("-")
    if instructions:
        bind(instructions, monkeypatch)
    return name


@pytest.fixture(params=_DISTINCT)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backend "cpu" once per instruction set."""
    bind(request.param, monkeypatch)
    return request.param


def bind(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make backend "cpu" use the library of an instruction set."""
    by_name = {isa.name: isa for isa in supported()}
    if instructions not in by_name:
        pytest.skip(f"this CPU has no {instructions}")
    library = open_library(build_cached(by_name[instructions]))
    assert library.psa_isa().decode() == instructions
    monkeypatch.setattr(call, "load", lambda: library)
