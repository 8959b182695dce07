"""Two tiers on a CUDA device: the answers of a resident pool, and what waits for the device.

python -m pytest test/gpu -m gpu        # on a machine with a CUDA device
"""

from collections.abc import Callable

import pytest
import torch

from sgl_psa.memory.placements import PLACEMENTS
from test.method.tiered_requests import Requests, Setup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SETUP = Setup(4, 16, 2, 4, 64, (1500, 3100, 640), 12, backend="triton", device="cuda")


def without_waiting(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, which fails where the host waits for the device."""

    def run(*args: object) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@pytest.mark.parametrize("rule", [{"delta": 0.05}, {"stop": "coverage", "predict": True}])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("share", [1, 4])
def test_decode_over_tiers_is_decode_over_one(placement: str, share: int, rule: dict) -> None:
    settings = SETUP.config(SETUP.all // share, placement=placement, **rule)
    tier = SETUP.build(settings)
    assert tier.tier.k_frames.is_cuda
    tiered, resident = Requests(SETUP, settings, tier), Requests(SETUP, settings, None)
    for requests in (tiered, resident):
        requests.prefill()
    tier.begin_step = without_waiting(tier.begin_step)  # type: ignore[method-assign]
    tier.write = without_waiting(tier.write)  # type: ignore[method-assign]
    for a, b in zip(tiered.steps(), resident.steps(), strict=True):
        assert torch.equal(a, b)
    assert tiered.wrapper.stats.as_dict() == resident.wrapper.stats.as_dict()
    for row, length in enumerate(SETUP.lengths):
        slots = tiered.req_to_token[row, :length].long()
        k, v = tier.read(2, tiered.pages(row, length), length)
        assert torch.equal(k, tiered.k[2][slots]) and torch.equal(v, tiered.v[2][slots])
    assert tier.check() == []
    snapshot = tier.snapshot()
    assert snapshot["loads"] > 0 and snapshot["misses"] > 0
    pages = [tiered.pages(row, n + SETUP.steps) for row, n in enumerate(SETUP.lengths)]
    assert snapshot["working_set_frames"] == sum(map(tier.working_set, pages))
    tier.close()
