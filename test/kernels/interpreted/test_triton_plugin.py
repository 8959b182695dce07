"""SGLang's pool and backend over the Triton tier, prefill as on a GPU: as over a resident pool, or
as over the reference's int8 host."""

from types import SimpleNamespace

import pytest
import torch
from sgl_psa_kernels.page_tier import TritonTier
from sgl_psa_kernels.progressive_decode import progressive_decode
from sglang_psa import attention_backend, prefill, tiered_report

from sgl_psa import kernel_check, wrapper
from test.plugin.engine_parts import DIM, KV_HEADS, LAYERS, PAGE, SLOTS, Driver, make_backend

FRAME = 2 * KV_HEADS * PAGE * DIM * 4
#: The fewest frames that a tier works with.
TIERS = {
    "device_pool_bytes": 2 * 64 // PAGE * FRAME,
    "host_pool_bytes": (SLOTS // PAGE + 1) * LAYERS * FRAME,
}
INT8 = {**TIERS, "host_dtype": "int8"}


def played(monkeypatch, **changes):
    """Outputs of a few prompts and steps with those of dense attention, and the driver."""
    monkeypatch.setattr(prefill, "choose", lambda *_: prefill.fused)
    common = {"backend": "triton", "scorer": "sketch", "sketch_bits": 1, "min_context": 0}
    common |= {"recent_pages": 1, "group_pages": 1, "group_percent": 0, "delta": 0.4}
    driver = Driver(make_backend(monkeypatch, **common | changes))
    steps = [("extend", {0: 26, 1: 3}), ("extend", {0: 5}), ("decode", {0: 1, 1: 1})]
    steps += [("decode", {0: 1, 1: 1})]
    return [pair for step in steps for pair in driver.step(*step)], driver


def test_an_int8_host_is_that_of_the_reference(monkeypatch) -> None:
    expected = played(monkeypatch, **INT8, backend="reference")[0]
    results, driver = played(monkeypatch, **INT8)
    for (want, _), (got, _) in zip(expected, results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    exact = [out for out, _ in played(monkeypatch, backend="reference")[0]]
    assert not all(torch.allclose(a, b, 1e-3) for a, (b, _) in zip(exact, results, strict=True))
    tier = driver.backend.pool.tier
    assert isinstance(tier.tier, TritonTier) and tier.snapshot()["misses"] > 0
    assert tier.check() == []


def test_prefill_and_decode_are_those_of_the_resident_pool(monkeypatch) -> None:
    (expected, _), (tiers, driver) = (played(monkeypatch, **changes) for changes in ({}, TIERS))
    for (resident, _), (tiered, exact) in zip(expected, tiers, strict=True):
        assert torch.equal(resident, tiered)
        assert (tiered - exact).norm() < 0.5 * exact.norm()
    pool = driver.backend.pool
    assert isinstance(pool.tier.tier, TritonTier)
    assert driver.backend.take_step() is not None
    assert pool.tier.check() == []
    assert pool.tier.snapshot()["misses"] > 0
    pages = driver.backend.req_to_token[0, :33:PAGE] // PAGE
    pool.forget_pages(pages)
    assert not pool.tier.tier.tables.filled[:, pages.long()].any()
    scheduler = SimpleNamespace(ps=SimpleNamespace(dp_rank=None, tp_rank=0, tp_size=1))
    assert tiered_report.section(pool, scheduler, None)["loads"] > 0


def test_a_server_whose_kernels_are_wrong_does_not_start(monkeypatch) -> None:
    """As on a GPU, where the kernels are checked; here a part of the cache that is quick."""
    monkeypatch.setattr(attention_backend, "interpreted", lambda: False)
    monkeypatch.setattr(kernel_check, "PAGES", 14)
    monkeypatch.setattr(kernel_check, "HOT_PAGES", 5)
    settings = {"backend": "triton", "scorer": "sketch", "group_pages": 2, "delta": 0.3}
    assert make_backend(monkeypatch, **settings).pool.kernel_backend == "triton"

    def halved(*args, **kwargs):
        out, lse, stats = progressive_decode(*args, **kwargs)
        return out / 2, lse, stats

    monkeypatch.setattr(wrapper, "progressive_decode", halved)
    with pytest.raises(kernel_check.KernelCheckError, match="use --psa-backend torch"):
        make_backend(monkeypatch, **settings)
