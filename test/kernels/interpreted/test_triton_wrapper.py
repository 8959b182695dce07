"""A decode step of the method on the Triton kernels: scorer, wrapper and statistics together."""

import pytest
import torch

from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from test.method.cache import PAGE, decode, dense, make_cache, make_wrapper


@pytest.mark.parametrize(
    ("scorer", "saves"), [("rotated_sketch", True), ("two_level", True), ("hybrid", False)]
)
def test_a_step_is_near_the_truth_and_reads_less(scorer: str, saves: bool) -> None:
    backend = resolve_backend("triton", "cpu")
    cache = make_cache([6 * PAGE + 3, 1], 1, 64, seed=3, sharp=3.0)
    q = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(4))
    exact = dense(cache, q, 64**-0.5)
    for delta in (0.0, 0.1):
        config = PSAConfig(
            min_context=0, scorer=scorer, delta=delta, group_pages=1, group_percent=0
        )
        wrapper, _ = make_wrapper(cache, config, backend)
        out, step = decode(wrapper, cache, q, 64**-0.5)
        assert step is not None
        error = (out.double() - exact).norm() / exact.norm()
        assert error < (1e-5 if delta == 0 else 0.2)
        left_out = step.row(0).pages_total - step.row(0).pages_attended
        assert left_out > 0 if saves and delta else left_out >= 0
        assert delta or left_out == 0
