"""Decode over two tiers: the answers of one, whatever the arena, and what is told of it."""

import dataclasses

import pytest
import torch
from sgl_psa_kernels._native import native_available

from sgl_psa.config import ConfigError
from sgl_psa.memory.placements import PLACEMENTS
from test.method.tiered_requests import Requests, Setup

#: Both implementations are tested with the kernels; here the fast one does where it can.
BACKEND = "cpu" if native_available()[0] else "reference"
PAGE, LENGTHS = 16, (150, 310, 64)
SETUP = Setup(3, PAGE, 2, 2, 32, LENGTHS, 4, BACKEND)
LAYERS, STEPS, ALL = SETUP.layers, SETUP.steps, SETUP.all


@pytest.mark.parametrize("rule", [{"delta": 0.05}, {"stop": "coverage", "predict": True}])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("frames", [26, ALL])
def test_decode_over_tiers_is_decode_over_one(placement: str, frames: int, rule: dict) -> None:
    settings = SETUP.config(frames, placement=placement, **rule)
    tier = SETUP.build(settings)
    tiered, resident = Requests(SETUP, settings, tier), Requests(SETUP, settings, None)
    for requests in (tiered, resident):
        requests.prefill()
    for a, b in zip(tiered.steps(), resident.steps(), strict=True):
        assert torch.equal(a, b)
    assert tiered.wrapper.stats.as_dict() == resident.wrapper.stats.as_dict()
    assert tier.check() == []
    snapshot = tier.snapshot()
    assert (snapshot["loads"] > 0) == (frames < ALL)
    assert snapshot["step"] == STEPS and 0 < snapshot["hit_rate"] <= 1
    assert snapshot["frames_used"] == sum(snapshot["frames_by_layer"]) <= snapshot["num_frames"]
    assert snapshot["history"]["steps"] == [4] and len(snapshot["history"]["frames"][0]) == LAYERS
    if placement == "even":
        assert max(snapshot["frames_by_layer"]) <= frames // LAYERS


def test_working_sets_are_what_was_attended_lately() -> None:
    settings = SETUP.config(ALL, policy="dense")
    tier = SETUP.build(settings)
    requests = Requests(SETUP, settings, tier)
    requests.prefill()
    pages = [requests.pages(row, length + 1) for row, length in enumerate(LENGTHS)]
    assert tier.working_set(pages[0]) == LAYERS  # nothing was attended, but a page will be open
    requests.step(0)
    for row, mine in enumerate(pages):
        assert tier.working_set(mine) == LAYERS * (LENGTHS[row] // PAGE + 1)
    assert tier.snapshot()["working_set_frames"] == sum(map(tier.working_set, pages))
    for _ in range(12):
        tier.begin_step()
    assert tier.working_set(pages[1]) == LAYERS
    tier.release(pages[0])
    tier.clear()
    assert tier.snapshot()["frames_used"] == 0 and tier.check() == []


@pytest.mark.parametrize("frames", [24, ALL])
def test_prefix_blocks_are_the_prefix(frames: int) -> None:
    settings = SETUP.config(frames)
    tier = SETUP.build(settings)
    requests = Requests(SETUP, settings, tier)
    requests.prefill()
    for row, tokens in ((1, 310), (1, 100), (0, 17), (2, 64)):
        slots = requests.req_to_token[row, :tokens].long()
        pages = requests.pages(row, tokens)
        blocks = [(k.clone(), v.clone()) for k, v in tier.prefix_blocks(2, pages, tokens, 3 * PAGE)]
        assert [len(k) for k, _ in blocks[:-1]] == [3 * PAGE] * (len(blocks) - 1)
        assert torch.equal(torch.cat([k for k, _ in blocks]), requests.k[2][slots])
        assert torch.equal(torch.cat([v for _, v in blocks]), requests.v[2][slots])
        new = torch.randn(2, 5, *requests.k.shape[2:])
        for found, want, rows in zip(
            tier.prefix_and_rows(2, pages, tokens, *new), (requests.k, requests.v), new, strict=True
        ):
            assert torch.equal(found, torch.cat([want[2][slots], rows]))
        k, v = tier.read(2, pages, tokens)
        assert torch.equal(k, requests.k[2][slots]) and torch.equal(v, requests.v[2][slots])
    with pytest.raises(ValueError, match="whole pages of 16"):
        next(tier.prefix_blocks(0, pages, 64, 40))


def test_what_tiers_do_not_serve_is_refused(tmp_path) -> None:
    settings = SETUP.config(ALL)
    tier = SETUP.build(settings)
    for change in ({"audit_rate": 0.5}, {"compensate": True}, {"scorer": "mean"}):
        resident = dataclasses.replace(settings, device_pool_bytes=0, host_pool_bytes=0, **change)
        with pytest.raises(ConfigError, match="device_pool_bytes"):
            Requests(SETUP, resident, tier)
    with pytest.raises(ConfigError, match="kernels 'torch' have no tiers"):
        dataclasses.replace(SETUP, backend="torch").build(settings)
    on_file = SETUP.config(ALL, host_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"host_path=.*must be memory; drop host_path"):
        dataclasses.replace(SETUP, backend="triton").build(on_file)
    with pytest.raises(ConfigError, match=r"placement='even' leaves 3 of 10 frames"):
        SETUP.build(SETUP.config(10, placement="even"))
    with pytest.raises(ConfigError, match="a decode step needs 8 frames"):
        SETUP.build(SETUP.config(7))


def test_memory_that_the_system_does_not_give_is_refused() -> None:
    settings = dataclasses.replace(SETUP.config(ALL), host_pool_bytes=1 << 55)
    with pytest.raises(ConfigError, match=r"host_pool_bytes=\d+: the system .* host_path"):
        SETUP.build(settings)


def test_a_host_file_serves_as_memory_does(tmp_path) -> None:
    settings = SETUP.config(26, host_path=str(tmp_path))
    tier = SETUP.build(settings)
    tiered, resident = Requests(SETUP, settings, tier), Requests(SETUP, settings, None)
    for requests in (tiered, resident):
        requests.prefill()
    for a, b in zip(tiered.steps(), resident.steps(), strict=True):
        assert torch.equal(a, b)
    assert tier.snapshot()["host_kind"] == "file"
    tier.close()
    tier.close()
