"""The check at start-up on Triton's kernels, a captured step included."""

import pytest
import torch
from sgl_psa_kernels.progressive_decode import progressive_decode

from sgl_psa import kernel_check, wrapper
from sgl_psa.config import PSAConfig
from sgl_psa.kernel_check import KernelCheckError, check_kernels
from sgl_psa.scorers import CacheShape
from test.method.fake_graph import FakeGraph

SHAPE = CacheShape(3, 100, 8, 1, 32, torch.device("cpu"))


def check(config: PSAConfig, dtype: torch.dtype) -> None:
    def make_graph():
        graph = FakeGraph()
        return graph, graph

    check_kernels(
        config, SHAPE, backend="triton", dtype=dtype, num_qo_heads=2, make_graph=make_graph
    )


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"candidate_pages": 12}, torch.float16),
        ({"stop": "coverage", "scorer": "rotated_sketch", "group_pages": 32}, torch.bfloat16),
        ({"stop": "change", "scorer": "hybrid", "compensate": False}, torch.float32),
    ],
    ids=["defaults", "coverage", "change"],
)
def test_right_kernels_pass(fields: dict, dtype: torch.dtype) -> None:
    check(PSAConfig(**fields), dtype)


def test_a_graph_with_what_a_replay_does_not_change_is_found(monkeypatch) -> None:
    def once(q, *args, **kwargs):
        return progressive_decode(torch.tensor(q.tolist(), dtype=q.dtype), *args, **kwargs)

    monkeypatch.setattr(wrapper, "progressive_decode", once)
    monkeypatch.setattr(kernel_check, "PAGES", 20)
    monkeypatch.setattr(kernel_check, "HOT_PAGES", 5)
    with pytest.raises(KernelCheckError, match="output of a CUDA graph"):
        check(PSAConfig(candidate_pages=12), torch.float32)
