"""The pool of two tiers: the resident pool's tokens, bit for bit, and none of its buffers."""

from types import SimpleNamespace

import pytest
import torch
from sglang_psa import compat, pool_hooks, prefill, tiered_capacity, tiered_report
from sglang_psa.allocator import CpuPagedAllocator
from sglang_psa.tiered_pool import NotResident
from sglang_psa.tiered_sizes import check_tiers

from sgl_psa.config import ConfigError, PSAConfig
from test.plugin.engine_parts import (
    CONTEXT,
    DIM,
    KV_HEADS,
    LAYERS,
    PAGE,
    SLOTS,
    Driver,
    make_backend,
    make_layer,
    make_pool,
)

#: K and V of a page in one layer, float32.
FRAME = 2 * KV_HEADS * PAGE * DIM * 4
FEWEST = 2 * 64 // PAGE
PAGES = (SLOTS + PAGE) // PAGE
HOST = PAGES * LAYERS * FRAME


def tiers(frames=FEWEST, **fields):
    return {"device_pool_bytes": frames * FRAME, "host_pool_bytes": HOST, **fields}


def page(number, count=PAGE):
    return list(range(number * PAGE, number * PAGE + count))


def write(pool, slots, layer=0, seed=0):
    slots = torch.tensor(slots)
    random = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, len(slots), KV_HEADS, DIM, generator=random)
    pool.set_kv_buffer(make_layer(layer), compat.KVWriteLoc(slots, None), k, v)
    return k, v


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def pool(backend):
    return make_pool(PSAConfig(backend=backend, **tiers()))


def outputs(driver):
    """Of prompts longer than the device tier, prefixes that have left it, and decode steps."""
    steps = [("extend", {0: 90, 1: 24}), ("extend", {1: 100, 2: 3}), ("extend", {0: 40})]
    steps += [("decode", {0: 1, 1: 1, 2: 1})] * 20 + [("extend", {3: 90, 2: 30})]
    steps += [("decode", {3: 1, 1: 1})] * 3
    return [out for step in steps for out, _ in driver.step(*step)]


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "topk", "scorer": "two_level", "budget_pages": 9},
        {"predict": True},
        {"policy": "dense"},
    ],
    ids=str,
)
def test_outputs_are_those_of_the_resident_pool(monkeypatch, tmp_path, backend, settings, place):
    common = {"backend": backend, "min_context": 0, "recent_pages": 1, "group_pages": 1, **settings}
    where = {"host_path": str(tmp_path)} if place == "disk" else {}
    results = []
    for changes in ({}, tiers(**where)):
        driver = Driver(make_backend(monkeypatch, **common, **changes))
        results.append(outputs(driver))
        pool = driver.backend.pool
    for resident, tiered in zip(*results, strict=True):
        assert torch.equal(resident, tiered)
    counters = pool.tier.tier.counters()
    assert counters.loads > 0 and counters.evictions > 0
    assert pool.tier.check() == []


def test_prefill_of_other_devices_reads_whole_prefixes_through_one_buffer(monkeypatch):
    """As on a GPU, with the C++ tier: the same call of attention as over the resident pool."""
    monkeypatch.setattr(prefill, "choose", lambda *_: prefill.fused)
    results = []
    for changes in ({}, tiers()):
        driver = Driver(make_backend(monkeypatch, backend="cpu", min_context=0, **changes))
        pool = driver.backend.pool
        buffer = pool.tier and pool.tier._staging
        steps = [("extend", {0: 90, 1: 24}), ("extend", {1: 100, 2: 3, 0: 40})]
        results.append([pair for step in steps for pair in driver.step(*step)])
    for (resident, exact), (tiered, _) in zip(*results, strict=True):
        assert torch.equal(resident, tiered)
        torch.testing.assert_close(tiered, exact, rtol=1e-4, atol=1e-5)
    assert buffer is pool.tier._staging and [len(x) for x in buffer] == [CONTEXT, CONTEXT]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_int8_host_gives_the_same_from_an_arena_of_any_size(monkeypatch, tmp_path, place):
    """And nearly that of the resident pool: prefixes that were read back are rounded."""
    common = {"backend": "cpu", "min_context": 0, "recent_pages": 1, "group_pages": 1}
    where = {"host_path": str(tmp_path)} if place == "disk" else {}
    results = []
    for frames in (None, PAGES * LAYERS, FEWEST + 5 * LAYERS):
        changes = {} if frames is None else tiers(frames, host_dtype="int8", **where)
        driver = Driver(make_backend(monkeypatch, **common, **changes))
        results.append(outputs(driver))
        pool = driver.backend.pool
    for resident, large, small in zip(*results, strict=True):
        assert torch.equal(large, small)
        torch.testing.assert_close(large, resident, rtol=0.1, atol=0.05)
    assert not all(map(torch.equal, results[0], results[1]))
    assert pool.tier.tier.counters().loads > 0
    assert pool.tier.check() == []


def test_rows_are_summarised_as_the_resident_pools(pool):
    resident = make_pool(PSAConfig(backend=pool.kernel_backend))
    for target in (pool, resident):
        write(target, page(3) + page(5, 3), layer=1)
        write(target, [5 * PAGE + 3], layer=1, seed=1)
    pairs = zip(pool.scorer.state_tensors(), resident.scorer.state_tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert pool.scorer.watermark[1, [3, 5]].tolist() == [PAGE, 4]


def test_released_pages_are_gone_from_both_tiers(pool, monkeypatch):
    release = CpuPagedAllocator._release_page_ids

    def hooked(self, *pages):
        return pool_hooks.release_pages(release(self, *pages), self, *pages)

    monkeypatch.setattr(CpuPagedAllocator, "_release_page_ids", hooked)
    allocator = CpuPagedAllocator(SLOTS, PAGE, torch.float32, "cpu", pool, False)
    write(pool, page(3) + page(5))
    allocator.free(torch.tensor(page(3), dtype=torch.int32))  # As in req_to_token.
    tables = pool.tier.tier.tables
    assert tables.filled[0, [3, 5]].tolist() == [0, PAGE]
    assert pool.scorer.watermark[0, [3, 5]].tolist() == [0, PAGE]
    assert tables.frame_of[0, 3] == -1
    pool_hooks.clear_pages(None, allocator)
    assert tables.filled.sum() == pool.scorer.watermark.sum() == 0
    assert (tables.owner == -1).all()


def test_rows_copied_out_come_back_elsewhere(pool):
    kv = [write(pool, page(3) + page(4, 5), layer, seed=layer) for layer in range(LAYERS)]
    copy = pool.get_cpu_copy(torch.tensor(page(3) + page(4, 5)))
    pool.forget_pages(torch.tensor([3, 4]))
    target = torch.tensor(page(8) + page(9, 5), dtype=torch.int32)
    pool.load_cpu_copy(copy, target)
    for layer, (k, v) in enumerate(kv):
        got = pool.tier.read(layer, torch.tensor([8, 9]), PAGE + 5)
        assert torch.equal(got[0], k) and torch.equal(got[1], v)
    assert pool.scorer.watermark[:, 8].tolist() == [PAGE] * LAYERS
    assert pool.scorer.watermark[:, 9].tolist() == [5] * LAYERS


def test_nobody_gets_a_buffer_of_everything(pool):
    slots = torch.tensor([0])
    for ask in (
        lambda: pool.get_key_buffer(0),
        lambda: pool.get_kv_buffer(1),
        lambda: pool.get_contiguous_buf_infos(),
        lambda: pool.move_kv_cache(slots, slots),
    ):
        with pytest.raises(NotResident, match="drop --psa-device-pool-bytes"):
            ask()


def test_memory_is_that_of_the_frames_and_the_summaries(pool):
    k_bytes, v_bytes = pool.get_kv_size_bytes()
    assert k_bytes + v_bytes == FEWEST * FRAME + pool.summaries.size_bytes()
    assert pool.k_buffer == pool.v_buffer == []
    assert pool.size == SLOTS


def test_tiers_have_the_pages_of_the_pool_where_fewer_are_asked_for():
    config = PSAConfig(backend="reference", **tiers(10 * PAGES, host_pool_bytes=100 * HOST))
    pool = make_pool(config)
    assert pool.tier.sizes.num_pages == PAGES
    assert pool.tier.sizes.num_frames == PAGES * LAYERS


def arguments(config, **changes):
    fields = {"attention_backend": "psa", "prefill_attention_backend": None, "page_size": PAGE}
    fields |= {"decode_attention_backend": None, "tp_size": 1, "dp_size": 1, "device": "cpu"}
    fields |= {"max_total_tokens": None, "max_running_requests": None, **changes}
    settings = {f"psa_{name}": value for name, value in config.as_dict().items()}
    return SimpleNamespace(**fields, **settings)


MODEL = SimpleNamespace(
    head_dim=DIM,
    num_hidden_layers=LAYERS,
    context_len=CONTEXT,
    dtype=torch.float32,
    get_num_kv_heads=lambda tp: KV_HEADS // tp,
)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    fake = "test.plugin.test_kv_pool:fake_parallel"
    monkeypatch.setitem(compat.IMPORTS, "get_parallel", fake)


def configurator_of(config, device="cpu", **changes):
    return SimpleNamespace(
        device=device,
        server_args=arguments(config, device=device, **changes),
        model_config=MODEL,
        kv_cache_dtype=torch.float32,
        layer_info=SimpleNamespace(num_effective_layers=LAYERS),
    )


def capacity(config, user_limit=None, tokens=123):
    """Tokens that SGLang takes, and the bytes that it takes for free."""
    configurator = configurator_of(config)

    def limited(_, found):
        return found if user_limit is None else min(found, user_limit)

    free = tiered_capacity.profile(lambda *_: 7, configurator, 10)
    return tiered_capacity.limit(limited, configurator, tokens), free


def test_capacity_is_that_of_the_host_tier():
    config = PSAConfig(**tiers())
    assert capacity(config) == (SLOTS, HOST)
    assert capacity(config, user_limit=64) == (64, HOST)
    tokens, free = capacity(PSAConfig(**tiers(host_dtype="int8")))
    assert 3 * SLOTS < tokens < 4 * SLOTS and free == HOST
    assert capacity(PSAConfig()) == (123, 7)


def test_a_gpu_needs_room_for_frames_summaries_and_a_prefix():
    """What is charged is what a pool of these sizes, and prefill over it, have."""
    config = PSAConfig(backend="reference", **tiers())
    configurator = configurator_of(config, "cuda")
    parts = tiered_capacity.device_bytes(configurator)
    pool = make_pool(config)
    assert parts["frames"] + parts["summaries"] == sum(pool.get_kv_size_bytes())
    pool.tier.reserve(CONTEXT)
    assert parts["prefix"] == sum(x.nbytes for x in pool.tier._staging)
    assert parts["tables"] == 16 * LAYERS * PAGES
    int8 = PSAConfig(backend="reference", **tiers(host_dtype="int8"))
    records = tiered_capacity.device_bytes(configurator_of(int8, "cuda", max_total_tokens=64))
    pages = 64 // PAGE + 1
    frames = records["frames"] // FRAME
    assert records["tables"] == 16 * LAYERS * pages + 4 * pages * PAGE + 8 * frames
    needed = sum(parts.values())
    assert tiered_capacity.profile(lambda *_: needed, configurator, 10) == HOST
    with pytest.raises(ConfigError, match=rf"GPU has {needed - 1} left") as caught:
        tiered_capacity.profile(lambda *_: needed - 1, configurator, 10)
    assert f"set device_pool_bytes to {FEWEST * FRAME - 1} or less" in str(caught.value)
    few = tiered_capacity.device_bytes(configurator_of(config, "cuda", max_total_tokens=64))
    assert few["summaries"] * PAGES == parts["summaries"] * (64 // PAGE + 1)
    assert few["prefix"] * CONTEXT == parts["prefix"] * 64


def refused(match, config=None, model=MODEL, **changes):
    config = config or PSAConfig(**tiers())
    with pytest.raises(ConfigError, match=match):
        check_tiers(config, arguments(config, **changes), model)


def test_tiers_that_cannot_work_are_refused_at_the_start(tmp_path):
    args = arguments(PSAConfig())
    check_tiers(PSAConfig(), args, MODEL)
    check_tiers(PSAConfig(**tiers(host_path=str(tmp_path))), args, MODEL)
    least = FEWEST * FRAME
    refused(f"set device_pool_bytes to {least} or more", PSAConfig(**tiers(FEWEST - 1)))
    refused(
        r"set host_pool_bytes to \d+ or more",
        PSAConfig(**tiers(1, host_pool_bytes=3 * LAYERS * FRAME)),
    )
    refused("no file can be made there", PSAConfig(**tiers(host_path=str(tmp_path / "none"))))
    int8 = PSAConfig(**tiers(FEWEST + 5 * LAYERS - 1, host_dtype="int8"))
    refused("4 requests .* --max-running-requests to 3 or less", int8, max_running_requests=4)
    check_tiers(int8, arguments(int8, max_running_requests=3), MODEL)
    uneven = PSAConfig(**tiers(FEWEST * LAYERS - 1, placement="even"))
    refused("placement='even' leaves .* or placement to demand", uneven)
    full = PSAConfig(**tiers(host_path=str(tmp_path), host_pool_bytes=1 << 60))
    refused("bytes free, host_pool_bytes of 2 ranks take", full, tp_size=2)
    huge = PSAConfig(**tiers(host_pool_bytes=1 << 60))
    refused("the machine has .* or set host_path to a folder", huge)
    refused(r"^host_pool_bytes=\d+ of 1 ranks .* free; set it lower$", huge, device="cuda")


def scheduler_of(pool, used=(), idle=True):
    allocator = CpuPagedAllocator(SLOTS, PAGE, torch.float32, "cpu", pool, False)
    free = allocator.free_pages
    allocator.free_pages = free[~torch.isin(free, torch.tensor(used, dtype=torch.int64))]
    return SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        is_fully_idle=lambda: idle,
        ps=SimpleNamespace(dp_rank=None, tp_rank=0, tp_size=1),
    )


def test_the_check_finds_what_the_allocator_and_the_tiers_disagree_on(pool):
    for layer in range(LAYERS):
        write(pool, page(3) + page(5), layer)
    write(pool, page(6))
    assert tiered_report.problems(pool, scheduler_of(pool, [3, 5, 6])) == [
        "1 pages of the prefix cache are not full in every layer"
    ]
    assert tiered_report.problems(pool, scheduler_of(pool, [3])) == [
        "2 free pages still hold tokens"
    ]
    pool.forget_pages(torch.tensor([6]))
    assert tiered_report.problems(pool, scheduler_of(pool, [3, 5])) == []


def test_the_check_runs_only_when_asked_for_and_idle(pool):
    question = SimpleNamespace(rid=tiered_report.CHECK)
    assert "idle" not in tiered_report.section(pool, scheduler_of(pool), SimpleNamespace(rid=None))
    busy = tiered_report.section(pool, scheduler_of(pool, idle=False), question)
    assert busy["idle"] is False and busy["problems"] is None
    assert tiered_report.section(pool, scheduler_of(pool), question)["problems"] == []


def test_ranks_are_added_up(pool):
    for layer in range(LAYERS):
        write(pool, page(3) + page(5), layer)
    question = SimpleNamespace(rid=tiered_report.CHECK)
    one = tiered_report.section(pool, scheduler_of(pool, [3]), question)
    both = tiered_report.merge([one, one])
    assert both["bytes_saved"] == 2 * one["bytes_saved"] > 0
    assert both["frames_by_layer"] == [2 * frames for frames in one["frames_by_layer"]]
    assert both["problems"] == 2 * one["problems"] and len(one["problems"]) == 1
    assert both["ranks"] == 2 * one["ranks"] and one["ranks"][0]["loads"] == one["loads"]
    newer = tiered_report.merge([one, {**one, "step": one["step"] + 3}])
    assert newer["step"] == one["step"] + 3
    assert both["frame_bytes"] == one["frame_bytes"] and both["hit_rate"] == one["hit_rate"]
    assert tiered_report.merge([one]) == one
    assert tiered_report.merge([None]) is None


def test_every_tensor_parallel_rank_is_part_of_the_section(pool, monkeypatch):
    """What the other rank finds wrong is reported, and that it is not idle."""
    for layer in range(LAYERS):
        write(pool, page(3), layer)
    question = SimpleNamespace(rid=tiered_report.CHECK)
    scheduler = scheduler_of(pool, [3])
    scheduler.tp_cpu_group = "tensor-parallel ranks"
    scheduler.ps.tp_size = 2
    idle = True

    def gather(parts, own, group):
        assert group == "tensor-parallel ranks"
        other = {**own, "idle": idle, "problems": ["rank 1: torn page"] if idle else None}
        parts[:] = [own, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found = tiered_report.section(pool, scheduler, question)
    assert found["idle"] and found["problems"] == ["rank 1: torn page"]
    assert found["bytes_saved"] == 2 * pool.tier.snapshot()["bytes_saved"] > 0
    write(pool, page(5), 0)
    assert tiered_report.section(pool, scheduler, question)["problems"] == [
        "rank 0: 1 free pages still hold tokens",
        "rank 1: torn page",
    ]
    idle = False
    found = tiered_report.section(pool, scheduler, question)
    assert found["idle"] is False and found["problems"] is None


def test_a_closed_pool_gives_its_file_back(tmp_path):
    pool = make_pool(PSAConfig(backend="reference", **tiers(host_path=str(tmp_path))))
    write(pool, page(3))
    tier = pool.tier
    pool._clear_buffers()
    with pytest.raises(RuntimeError, match="closed"):
        tier.write(0, torch.tensor([8]), *torch.zeros(2, 1, KV_HEADS, DIM))
    assert list(tmp_path.iterdir()) == []
