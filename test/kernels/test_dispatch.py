"""Choice of backends, refusals of bad arguments, and the package's imports."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import Case, make_batch
from sgl_psa_kernels import BACKENDS, key_sketch, page_summary
from sgl_psa_kernels._native import call
from sgl_psa_kernels.prefill_attention import prefill
from sgl_psa_kernels.progressive_decode import progressive_decode


def batch_and_arguments():
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (40,)))
    one = torch.zeros(1)
    arguments = {
        "q": batch.q,
        "k_cache": batch.k,
        "v_cache": batch.v,
        "page_table": batch.page_table,
        "seq_lens": batch.seq_lens,
        "log_mass": None,
        "mode": torch.zeros(1, dtype=torch.int32),
        "threshold": one,
        "kappa_floor": one,
        "kappa_std": one,
        "page_size": 16,
        "sm_scale": 0.1,
        "sink_pages": 1,
        "recent_pages": 1,
        "group_pages": 1,
        "backend": "reference",
    }
    return batch, arguments


def test_unknown_backend_names_the_choices() -> None:
    assert BACKENDS == ("reference", "torch", "cpu")
    _, arguments = batch_and_arguments()
    arguments["backend"] = "cuda"
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*'reference', 'torch', 'cpu'"):
        progressive_decode(**arguments)
    x = torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="unknown backend"):
        prefill(x, None, None, x, x, sm_scale=1.0, backend="auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"page_size": 12}, "power of two"),
        ({"page_size": 4096}, "multiple of page_size"),
        ({"group_pages": 0}, "group_pages"),
        ({"group_percent": -1}, "group_percent"),
        ({"sink_pages": -1}, "sink_pages"),
        ({"mode": torch.zeros(1, dtype=torch.int64)}, r"mode must be torch\.int32"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32)}, r"seq_lens must have shape \[1\]"),
        ({"q": torch.zeros(1, 2, 64, dtype=torch.float16)}, "convert q"),
        ({"q": torch.zeros(1, 2, 32)}, "head_dim"),
        ({"q": torch.zeros(1, 2, 128)[..., ::2]}, "contiguous"),
        ({"log_mass": torch.zeros(1, 2, 1)}, "log_mass must have shape"),
    ],
)
def test_bad_arguments_are_refused(backend: str, change: dict, match: str) -> None:
    _, arguments = batch_and_arguments()
    with pytest.raises(ValueError, match=match):
        progressive_decode(**(arguments | change | {"backend": backend}))


def test_float64_is_for_the_reference_only() -> None:
    _, arguments = batch_and_arguments()
    for name in ("q", "k_cache", "v_cache"):
        arguments[name] = arguments[name].double()
    progressive_decode(**arguments)
    with pytest.raises(ValueError, match="backend='reference'"):
        progressive_decode(**(arguments | {"backend": "cpu"}))


def test_bad_sketch_and_summary_shapes_are_refused() -> None:
    batch, _ = batch_and_arguments()
    codes = torch.zeros(batch.num_pages, 1, 16, 16, dtype=torch.uint8)
    affine = torch.zeros(batch.num_pages, 1, 16, 2, dtype=torch.float16)
    slots = torch.tensor([1])
    for bits, match in ((3, "bits must be one of"), (4, "codes must have shape")):
        with pytest.raises(ValueError, match=match):
            key_sketch.write(batch.k, slots, codes, affine, bits=bits, page_size=16, backend="cpu")
    summary = torch.zeros(batch.num_pages, 1, 3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="summary must have shape"):
        page_summary.update(
            batch.k,
            torch.tensor([1]),
            torch.tensor([1], dtype=torch.int32),
            summary,
            kind="hybrid",
            page_size=16,
            backend="cpu",
        )


def test_without_native_library_the_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no C++ compiler found; install one")

    monkeypatch.setattr(call, "load", refuse)
    _, arguments = batch_and_arguments()
    with pytest.raises(RuntimeError, match="install one"):
        progressive_decode(**(arguments | {"backend": "cpu"}))
    progressive_decode(**arguments)


def test_imports_go_downward_only() -> None:
    """The operators import neither the method nor SGLang; building them does not import torch."""
    script = (
        "import sys\n"
        "import sgl_psa_kernels._native.build\n"
        "assert 'torch' not in sys.modules\n"
        "import sgl_psa_kernels.key_sketch, sgl_psa_kernels.page_summary\n"
        "import sgl_psa_kernels.progressive_decode, sgl_psa_kernels.prefill_attention\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('sglang', 'sgl_psa')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
