"""Triton kernels without a GPU: interpreted, compiled for CUDA, refused where they cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sgl_psa_kernels.merge_state import merge_state
from sgl_psa_kernels.prefill_attention import prefill
from sgl_psa_kernels.progressive_decode import progressive_decode
from test_dispatch import batch_and_arguments

HERE = Path(__file__).resolve().parent


def run(arguments: list[str], **environment: str) -> str:
    """Output of a Python process with the environment given; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_in_the_interpreter() -> None:
    folder = str(HERE / "interpreted")
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    output = run(["-m", "pytest", folder, *options], TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output


def test_every_kernel_compiles_for_hopper() -> None:
    """Types, layouts and shared memory, by Triton's compiler and ptxas; no GPU is needed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    output = run([str(HERE / "compile_triton.py")])
    for name in ("rounds", "merge_rows", "key_sketch", "page_tier"):
        assert name in output


def test_triton_is_imported_when_it_is_called_only() -> None:
    script = (
        "import sys\n"
        "import sgl_psa_kernels.key_sketch, sgl_psa_kernels.page_summary\n"
        "import sgl_psa_kernels.progressive_decode, sgl_psa_kernels.merge_state\n"
        "assert 'triton' not in sys.modules\n"
    )
    run(["-c", script])


def test_without_a_cuda_device_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, arguments = batch_and_arguments()
    with pytest.raises(RuntimeError, match=r"CUDA device.*TRITON_INTERPRET=1"):
        progressive_decode(**(arguments | {"backend": "triton"}))
    x = torch.zeros(2, 16)
    with pytest.raises(RuntimeError, match=r"merge_state.*CUDA device"):
        merge_state(x, x[:, 0], x, x[:, 0], backend="triton")


def test_float64_is_for_the_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, arguments = batch_and_arguments()
    for name in ("q", "k_cache", "v_cache"):
        arguments[name] = arguments[name].double()
    with pytest.raises(ValueError, match="backend='reference'"):
        progressive_decode(**(arguments | {"backend": "triton"}))


def test_operators_without_a_triton_version_refuse() -> None:
    x = torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        prefill(x, None, None, x, x, sm_scale=1.0, backend="triton")
