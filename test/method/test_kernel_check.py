"""The check of kernels at start-up, on kernels that are right and on ones that are not."""

import dataclasses

import pytest
import torch
from sgl_psa_kernels.progressive_decode import progressive_decode

from sgl_psa import wrapper
from sgl_psa.config import PSAConfig
from sgl_psa.kernel_check import KernelCheckError, check_kernels
from sgl_psa.scorers import SCORERS, CacheShape, Scorer
from sgl_psa.stop import STOP_RULES

TIERS = {"device_pool_bytes": 1 << 20, "host_pool_bytes": 1 << 24}
SHAPE = CacheShape(7, 1000, 16, 2, 64, torch.device("cpu"))


def check(config: PSAConfig, shape: CacheShape = SHAPE, **changes) -> None:
    options = {"backend": "torch", "dtype": torch.float32, "num_qo_heads": 4, **changes}
    check_kernels(config, shape, **options)


@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_right_kernels_pass(scorer: str, stop: str, dtype: torch.dtype) -> None:
    check(PSAConfig(scorer=scorer, stop=stop), dtype=dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "topk", "audit_rate": 0.5},
        {"predict": True, "stop": "coverage", "conservative": True},
        {"compensate": True, "sketch_bits": 1, "scorer": "rotated_sketch"},
        {"sink_pages": 0, "recent_pages": 7, "group_pages": 20, "candidate_pages": 3},
        {**TIERS, "host_dtype": "int8", "min_context": 10**6},
        {**TIERS, "placement": "even", "pipeline": False, "policy": "window"},
    ],
    ids=str,
)
def test_settings_do_not_matter(fields: dict) -> None:
    check(PSAConfig(**fields))


@pytest.mark.parametrize("page", [8, 32, 128])
@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 8, 128), (3, 1, 80), (2, 5, 256)])
def test_shapes(page: int, heads: int, group: int, dim: int) -> None:
    shape = SHAPE._replace(page_size=page, num_kv_heads=heads, head_dim=dim)
    check(PSAConfig(), shape, num_qo_heads=heads * group, dtype=torch.bfloat16)


def wrong(change):
    """``progressive_decode`` whose results pass through ``change``."""

    def run(*args, **kwargs):
        out, lse, stats = progressive_decode(*args, **kwargs)
        return change(out), lse, stats

    return run


def another_head(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:, 1:], out[:, :1]], 1)


def not_a_number(out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[0, -1, -1] = float("nan")
    return out


def a_little_off(out: torch.Tensor) -> torch.Tensor:
    return 1.05 * out


@pytest.mark.parametrize("change", [another_head, not_a_number, a_little_off])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wrong_outputs_are_found(change, dtype, monkeypatch) -> None:
    monkeypatch.setattr(wrapper, "progressive_decode", wrong(change))
    with pytest.raises(KernelCheckError, match=r"output of \d+ tokens: .*--psa-backend torch"):
        check(PSAConfig(), dtype=dtype)


def test_wrong_estimates_are_found(monkeypatch) -> None:
    class Turned(SCORERS["sketch"]):
        def score(self, *args, **kwargs):
            return -super().score(*args, **kwargs)

    monkeypatch.setitem(SCORERS, "sketch", Turned)
    assert issubclass(Turned, Scorer)
    with pytest.raises(KernelCheckError, match="use --psa-backend torch"):
        check(PSAConfig(scorer="sketch"))


def test_what_cannot_run_is_named(monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(wrapper, "progressive_decode", broken)
    with pytest.raises(KernelCheckError, match=r"failed its check on cpu \(RuntimeError: no such"):
        check(dataclasses.replace(PSAConfig(), policy="dense"))
