"""Decode of the method over two tiers on the Triton kernels: the answers of a resident pool."""

from __future__ import annotations

import pytest
import torch
from sgl_psa_kernels.page_tier import TritonTier

from sgl_psa.config import PSAConfig
from sgl_psa.memory import open_pages
from sgl_psa.memory.tiered_cache import LINK_BYTES_PER_NS, TieredCache
from test.method.tiered_requests import Requests, Setup

#: Scored by torch, as the interpreter takes minutes to sketch the prompts.
SETUP = Setup(2, 32, 1, 2, 16, (150, 40), 3, backend="triton", scoring="torch")
QUARTER = SETUP.all // 4
#: Frames set aside for open pages, and some for full ones.
FEW = 5 * SETUP.layers


def played(settings: PSAConfig, tier: TieredCache | None) -> tuple[Requests, list[torch.Tensor]]:
    """Requests over tiers, or over one."""
    if tier is not None:
        tier.tier.k_frames.fill_(float("nan"))
        tier.tier.v_frames.fill_(float("nan"))
    requests = Requests(SETUP, settings, tier)
    requests.prefill()
    return requests, requests.steps()


@pytest.mark.parametrize(
    ("frames", "rule"),
    [
        (SETUP.all, {"delta": 0.6}),
        (QUARTER, {"delta": 0.6, "placement": "lru", "predict": True}),
    ],
    ids=["all frames", "quarter"],
)
def test_decode_over_tiers_is_decode_over_one(frames: int, rule: dict) -> None:
    rule = {"group_pages": 1, "group_percent": 0, "scorer": "rotated_sketch", **rule}
    settings = SETUP.config(frames, **rule)
    tier = SETUP.build(settings)
    assert isinstance(tier.tier, TritonTier)
    tiered, got = played(settings, tier)
    resident, want = played(settings, None)
    assert all(map(torch.equal, got, want))
    assert tiered.wrapper.stats.as_dict() == resident.wrapper.stats.as_dict()
    assert tiered.wrapper.stats.total().pages_attended < tiered.wrapper.stats.total().pages_total
    assert tier.check() == [] and tier.tier.set_aside == 0
    snapshot = tier.snapshot()
    assert snapshot["loads"] > 0 and snapshot["hits"] > 0 and snapshot["misses"] > 0
    assert (snapshot["evictions"] > 0) == (frames < SETUP.all)
    # One KV head: a miss reads a frame's bytes.
    through = snapshot["misses"] * SETUP.frame
    assert snapshot["bytes_read_through"] == through
    assert tier.waited_ns() == through // LINK_BYTES_PER_NS
    assert snapshot["hit_rate"] == snapshot["hits"] / (snapshot["hits"] + snapshot["misses"])
    assert snapshot["frames_used"] == sum(snapshot["frames_by_layer"]) <= frames
    pages = [tiered.pages(row, n + SETUP.steps) for row, n in enumerate(SETUP.lengths)]
    assert snapshot["working_set_frames"] == sum(map(tier.working_set, pages)) > 0
    tier.release(pages[0])
    assert tier.working_set(pages[0]) == SETUP.layers and tier.check() == []
    tier.close()


def test_an_int8_host_answers_alike_from_an_arena_of_any_size() -> None:
    """And not as the resident pool: pages are rounded."""
    rule = {"delta": 0.6, "group_pages": 1, "scorer": "rotated_sketch", "host_dtype": "int8"}
    results, tiers = [], []
    for frames in (SETUP.all, FEW):
        settings = SETUP.config(frames, **rule)
        tiers.append(SETUP.build(settings))
        assert open_pages.reserve(settings, tiers[-1].tier, 2) == SETUP.layers * 3
        results.append(played(settings, tiers[-1]))
    (_, large), (requests, small) = results
    assert all(map(torch.equal, large, small))
    resident = played(SETUP.config(SETUP.all, **rule | {"host_dtype": "auto"}), None)[1]
    assert not all(map(torch.equal, large, resident))
    for a, b in zip(large[:2], resident[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    for tier in tiers:
        assert tier.check() == []
        snapshot = tier.snapshot()
        assert snapshot["host_dtype"] == "int8" and snapshot["loads"] > 0
        assert snapshot["bytes_read_through"] == snapshot["misses"] * snapshot["record_bytes"] > 0
    pages = requests.pages(0, 150)
    k, v = tiers[1].read(1, pages, 150)
    assert torch.equal(torch.stack([k, v]), torch.stack(tiers[0].read(1, pages, 150)))


def test_prefixes_are_read_from_the_host_and_from_frames() -> None:
    settings = SETUP.config(QUARTER, policy="dense")
    tier = SETUP.build(settings)
    requests = Requests(SETUP, settings, tier)
    requests.prefill()
    slots, pages = requests.req_to_token[0, :100].long(), requests.pages(0, 100)
    tier.reserve(107)
    buffer = tier._staging
    new = torch.randn(2, 7, 1, 16)
    for step in range(2):
        k, v = tier.prefix_and_rows(1, pages, 100, *new)
        assert torch.equal(k, torch.cat([requests.k[1][slots], new[0]]))
        assert torch.equal(v, torch.cat([requests.v[1][slots], new[1]]))
        if step == 0:  # Then some pages have frames.
            requests.step(0)
            requests.step(1)
            slots = requests.req_to_token[0, :100].long()
    assert tier._staging is buffer
    k, v = tier.read(0, pages, 33)
    assert torch.equal(k, requests.k[0][slots[:33]]) and torch.equal(v, requests.v[0][slots[:33]])
