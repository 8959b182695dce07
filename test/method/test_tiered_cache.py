"""Decode over two tiers: the answers of one, whatever the arena, and what is told of it."""

import dataclasses

import pytest
import torch
from sgl_psa_kernels._native import native_available

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.memory.placements import PLACEMENTS
from sgl_psa.memory.tiered_cache import TieredCache
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper

LAYERS, PAGE, HEADS, GROUP, DIM = 3, 16, 2, 2, 32
LENGTHS = [150, 310, 64]
STEPS = 4
FRAME = 2 * HEADS * PAGE * DIM * 4
NUM_PAGES = 1 + sum(-(-(n + STEPS) // PAGE) for n in LENGTHS)
ALL = LAYERS * NUM_PAGES
#: Both implementations are tested with the kernels; here the fast one does where it can.
BACKEND = "cpu" if native_available()[0] else "reference"


def config(frames: int, **settings) -> PSAConfig:
    return PSAConfig(
        min_context=0,
        recent_pages=1,
        group_pages=2,
        device_pool_bytes=frames * FRAME,
        host_pool_bytes=ALL * FRAME,
        **settings,
    )


def build(settings: PSAConfig) -> TieredCache:
    return TieredCache.build(
        settings,
        num_layers=LAYERS,
        page_size=PAGE,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        backend=BACKEND,
    )


class Requests:
    """Requests that are prefilled and then decode a few tokens, over one cache or two tiers."""

    def __init__(self, settings: PSAConfig, tier: TieredCache | None) -> None:
        shape = CacheShape(LAYERS, NUM_PAGES, PAGE, HEADS, DIM, torch.device("cpu"))
        self.summaries = make_summaries(settings, shape, BACKEND)
        self.tier = tier
        self.wrapper = PSADecodeWrapper(
            settings, self.summaries.scorer, backend=BACKEND, kv_element_bytes=4, tier=tier
        )
        self.rules = RuleTable(settings, len(LENGTHS), shape.device)
        self.k = torch.zeros(LAYERS, NUM_PAGES * PAGE, HEADS, DIM)
        self.v = torch.zeros_like(self.k)
        self.rng = torch.Generator().manual_seed(5)
        order = iter(1 + torch.randperm(NUM_PAGES - 1, generator=self.rng))
        width = -(-(max(LENGTHS) + STEPS) // PAGE) * PAGE
        self.req_to_token = torch.zeros(len(LENGTHS), width, dtype=torch.int32)
        for row, length in enumerate(LENGTHS):
            for start in range(0, length + STEPS, PAGE):
                slots = next(order) * PAGE + torch.arange(PAGE)
                self.req_to_token[row, start : start + PAGE] = slots.int()

    def pages(self, row: int, tokens: int) -> torch.Tensor:
        return self.req_to_token[row, :tokens:PAGE].long() // PAGE

    def write(self, layer: int, slots: torch.Tensor) -> None:
        size = (len(slots), HEADS, DIM)
        k = 1.5 * torch.randn(size, generator=self.rng)
        v = torch.randn(size, generator=self.rng)
        self.k[layer][slots], self.v[layer][slots] = k, v
        self.summaries.on_write(layer, slots, self.k[layer], self.v[layer])
        if self.tier is not None:
            self.tier.write(layer, slots, k, v)

    def prefill(self) -> None:
        for row, length in enumerate(LENGTHS):
            for layer in range(LAYERS):
                self.write(layer, self.req_to_token[row, :length].long())

    def step(self, done: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = torch.arange(len(LENGTHS))
        lens = torch.tensor(LENGTHS) + done + 1
        self.wrapper.plan(self.req_to_token, rows, lens, self.rules.rows(rows))
        results = []
        for layer in range(LAYERS):
            self.write(layer, self.req_to_token[rows, lens - 1].long())
            q = torch.randn(len(rows), HEADS * GROUP, DIM, generator=self.rng)
            caches = (None, None) if self.tier is not None else (self.k[layer], self.v[layer])
            results.append(self.wrapper.run(layer, q, *caches, 0.2))
        return results

    def steps(self) -> list[torch.Tensor]:
        results = [tensor for done in range(STEPS) for pair in self.step(done) for tensor in pair]
        self.wrapper.finish()
        return results


@pytest.mark.parametrize("rule", [{"delta": 0.05}, {"stop": "coverage", "predict": True}])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("frames", [26, ALL])
def test_decode_over_tiers_is_decode_over_one(placement: str, frames: int, rule: dict) -> None:
    settings = config(frames, placement=placement, **rule)
    tier = build(settings)
    tiered, resident = Requests(settings, tier), Requests(settings, None)
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
    settings = config(ALL, policy="dense")
    tier = build(settings)
    requests = Requests(settings, tier)
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
    settings = config(frames)
    tier = build(settings)
    requests = Requests(settings, tier)
    requests.prefill()
    for row, tokens in ((1, 310), (1, 100), (0, 17), (2, 64)):
        slots = requests.req_to_token[row, :tokens].long()
        pages = requests.pages(row, tokens)
        blocks = [(k.clone(), v.clone()) for k, v in tier.prefix_blocks(2, pages, tokens, 3 * PAGE)]
        assert [len(k) for k, _ in blocks[:-1]] == [3 * PAGE] * (len(blocks) - 1)
        assert torch.equal(torch.cat([k for k, _ in blocks]), requests.k[2][slots])
        assert torch.equal(torch.cat([v for _, v in blocks]), requests.v[2][slots])
        k, v = tier.read(2, pages, tokens)
        assert torch.equal(k, requests.k[2][slots]) and torch.equal(v, requests.v[2][slots])
    with pytest.raises(ValueError, match="whole pages of 16"):
        next(tier.prefix_blocks(0, pages, 64, 40))


def test_what_tiers_do_not_serve_is_refused() -> None:
    settings = config(ALL)
    tier = build(settings)
    for change in ({"audit_rate": 0.5}, {"compensate": True}, {"scorer": "mean"}):
        resident = dataclasses.replace(settings, device_pool_bytes=0, host_pool_bytes=0, **change)
        with pytest.raises(ConfigError, match="device_pool_bytes"):
            Requests(resident, tier)
    with pytest.raises(ConfigError, match="kernels 'triton' have no tiers"):
        TieredCache.build(
            settings,
            num_layers=LAYERS,
            page_size=PAGE,
            num_kv_heads=HEADS,
            head_dim=DIM,
            dtype=torch.float32,
            backend="triton",
        )
    with pytest.raises(ConfigError, match=r"placement='even' leaves 3 of 10 frames"):
        build(config(10, placement="even"))
    with pytest.raises(ConfigError, match="a decode step needs 8 frames"):
        build(config(7))


def test_a_host_file_serves_as_memory_does(tmp_path) -> None:
    settings = config(26, host_path=str(tmp_path))
    tier = build(settings)
    tiered, resident = Requests(settings, tier), Requests(settings, None)
    for requests in (tiered, resident):
        requests.prefill()
    for a, b in zip(tiered.steps(), resident.steps(), strict=True):
        assert torch.equal(a, b)
    assert tier.snapshot()["host_kind"] == "file"
    tier.close()
    tier.close()
