"""Which kernels run, and what is said when those asked for cannot."""

import pytest
from sgl_psa_kernels.progressive_decode import flashinfer_rows

from sgl_psa.backends import around, resolve_backend
from sgl_psa.config import ConfigError


def test_triton_is_for_cuda_and_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_backend("triton", "cuda") == "triton"
    with pytest.raises(ConfigError, match=r"backend=triton.*CUDA device.*TRITON_INTERPRET=1"):
        resolve_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu") == "triton"
    with pytest.raises(ConfigError, match="not on mps"):
        resolve_backend("triton", "mps")


def test_flashinfer_needs_triton_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"backend=flashinfer.*CUDA device"):
        resolve_backend("flashinfer", "cpu")
    monkeypatch.setattr(flashinfer_rows, "flashinfer_available", lambda: (True, ""))
    assert resolve_backend("flashinfer", "cuda") == "flashinfer"
    assert around("flashinfer") == around("triton") == "triton" and around("cpu") == "cpu"
    monkeypatch.setattr(flashinfer_rows, "flashinfer_available", lambda: (False, "pip install it"))
    with pytest.raises(ConfigError, match=r"backend=flashinfer.*pip install it; or use auto"):
        resolve_backend("flashinfer", "cuda")


def test_auto_on_cuda_is_triton_where_it_is_installed(monkeypatch, caplog) -> None:
    assert resolve_backend("auto", "cuda") == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_backend("auto", "cuda") == "torch"
    assert "pip install triton" in caplog.text


def test_auto_elsewhere_is_torch() -> None:
    assert resolve_backend("auto", "xpu") == "torch"


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_cpu_kernels_are_refused_on_cuda(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"backend={asked}.*use auto"):
        resolve_backend(asked, "cuda")
