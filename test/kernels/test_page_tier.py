"""Page tiers: what is written is what is read, wherever it lies, and the tables say where."""

import math
import os

import pytest
import torch
from sgl_psa_kernels.page_tier import HostStore, HostStoreError, TierShape, make_tier
from sgl_psa_kernels.progressive_decode import progressive_decode
from tier_cases import Pool

SHAPE = TierShape(3, 24, 16, 8, 2, 32, torch.bfloat16)


@pytest.fixture(params=["reference", "cpu"])
def tier_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["memory", "file", "int8 memory", "int8 file"])
def pool(request: pytest.FixtureRequest, tier_backend: str) -> Pool:
    *int8, host = request.param.split()
    shape = SHAPE._replace(host_dtype=torch.int8) if int8 else SHAPE
    return Pool.make(shape, tier_backend, host)


def test_a_prefill_beyond_the_arena_is_saved_and_takes_free_frames_only(pool: Pool) -> None:
    pages = torch.randperm(23, generator=pool.rng)[:15] + 1
    pool.fill(pages, 8 * 14 + 3)
    pool.tier.drain()
    assert pool.tier.check() == []
    tables, counters = pool.tier.tables, pool.tier.counters()
    assert int((tables.owner >= 0).sum()) == 16
    # The frames went to the first layer and, by eviction, to the open page of each other one.
    assert counters.evictions == 2
    assert (tables.saved[:, pages[:14]] == 8).all()
    assert tables.filled[:, pages[14]].tolist() == [3, 3, 3]
    assert (tables.frame_of[:, pages[14]] >= 0).all()
    assert counters.bytes_saved == 3 * 14 * pool.shape.record_bytes
    for layer in range(3):
        assert torch.equal(pool.gather(layer, pages, 115), pool.truth(layer, pages, 115))


def test_decode_writes_fill_an_open_page_that_loses_its_frame_in_between(pool: Pool) -> None:
    pool.fill(torch.tensor([1]), 5)
    pool.fill(torch.arange(2, 24), 22 * 8)
    order = torch.arange(SHAPE.num_frames, dtype=torch.int32)[None]
    for token in range(5, 8):
        for layer in range(3):
            pool.tier.set_victims(order)
            for page in range(2, 10):
                decode(pool, layer, torch.tensor([page]), 8)
            pool.write(layer, torch.tensor([8 + token]))
    pool.tier.drain()
    assert pool.tier.check() == []
    assert pool.tier.tables.saved[:, 1].tolist() == [8, 8, 8]
    for layer in range(3):
        pages = torch.tensor([1])
        assert torch.equal(pool.gather(layer, pages, 8), pool.truth(layer, pages, 8))


def decode(pool: Pool, layer: int, pages: torch.Tensor, length: int, step: int = 1):
    """Dense decode of one row by the tier, and on the resident pool."""
    shape = pool.shape
    q = torch.randn(1, 2 * shape.num_kv_heads, shape.head_dim, generator=pool.rng)
    rule = [torch.zeros(1, dtype=torch.int32), *torch.zeros(3, 1)]
    args = (q.to(shape.dtype), pages[None].int(), torch.tensor([length], dtype=torch.int32), None)
    options = {
        "sm_scale": shape.head_dim**-0.5,
        "sink_pages": 1,
        "recent_pages": 1,
        "group_pages": 2,
    }
    got = pool.tier.decode(layer, step, *args, *rule, **options)
    want = progressive_decode(
        args[0],
        pool.k[layer],
        pool.v[layer],
        *args[1:],
        *rule,
        page_size=shape.page_size,
        backend="reference" if type(pool.tier).__name__ == "ReferenceTier" else "cpu",
        **options,
    )
    assert all(map(torch.equal, got, want))
    return got


def test_decode_loads_what_it_attends_and_stamps_it(pool: Pool) -> None:
    pages = torch.arange(1, 22)
    pool.fill(pages, 21 * 8 - 1)
    before = pool.tier.counters()
    decode(pool, 2, pages, 21 * 8 - 1, step=7)
    pool.tier.drain()
    after, tables = pool.tier.counters(), pool.tier.tables
    assert pool.tier.check() == []
    assert after.loads - before.loads >= 20  # layer 2 had its open page only
    assert after.bytes_loaded == after.loads * pool.shape.record_bytes
    assert (tables.stamp[2, 1:22] == 7).all()
    assert int(tables.stamp.sum()) == 21 * 7
    resident = tables.owner[tables.owner >= 0]
    assert (resident // SHAPE.num_pages == 2).sum() > 1


def test_released_pages_hold_nothing(pool: Pool) -> None:
    pool.fill(torch.arange(1, 10), 70)
    pool.tier.release(torch.tensor([3, 9, 20]))
    assert pool.tier.check() == []
    assert (pool.tier.tables.filled[:, [3, 9]] == 0).all()
    with pytest.raises(RuntimeError, match="page 3 of layer 1 holds 0 tokens, 8 are asked for"):
        pool.gather(1, torch.tensor([2, 3]), 16)
    with pytest.raises(RuntimeError, match="page 9 of layer 0 holds 0 tokens"):
        decode(pool, 0, torch.tensor([2, 9]), 10)
    pool.tier.clear()
    assert pool.tier.check() == []
    assert (pool.tier.tables.owner == -1).all()
    pool.fill(torch.arange(1, 24), 180)
    assert torch.equal(
        pool.gather(2, torch.arange(1, 24), 180), pool.truth(2, torch.arange(1, 24), 180)
    )


def test_a_page_that_is_written_from_its_start_begins_anew(pool: Pool) -> None:
    pool.fill(torch.tensor([4]), 8)
    pool.fill(torch.tensor([4]), 3)
    assert pool.tier.tables.filled[:, 4].tolist() == [3, 3, 3]
    pool.write(0, torch.tensor([0, 0, 0]))  # padding tokens share a slot
    assert int(pool.tier.tables.filled[0, 0]) == 1
    with pytest.raises(RuntimeError, match="holds 3 tokens"):
        pool.gather(0, torch.tensor([4]), 8)
    pool.tier.drain()
    assert pool.tier.check() == []


def test_victims_go_in_their_order(pool: Pool) -> None:
    pages = torch.arange(1, 17)
    pool.write(0, pool.slots(pages))  # 16 full pages in 16 frames
    pool.tier.drain()
    frame_of = pool.tier.tables.frame_of
    order = frame_of[0, [5, 9, 2, 7]].clone()
    decode(pool, 0, torch.tensor([9]), 8)
    pool.tier.set_victims(torch.stack([torch.full_like(order, -1), order]))
    decode(pool, 0, torch.tensor([2]), 8)  # attended since: passed over
    for page in (17, 18, 19):
        pool.write(1, torch.tensor([8 * page]))
    assert (frame_of[0, [5, 9, 7]] == -1).all()
    assert int(frame_of[0, 2]) >= 0
    assert pool.tier.counters().recycled == 0
    pool.write(1, torch.tensor([8 * 20]))
    assert pool.tier.counters().recycled == 1
    pool.tier.drain()
    assert pool.tier.check() == []


def test_a_layer_at_its_quota_takes_its_own_frames(tier_backend: str) -> None:
    shape = SHAPE._replace(num_frames=40)
    pool = Pool.make(shape, tier_backend)
    pool.tier.set_quota(18)
    pool.fill(torch.arange(1, 23), 22 * 8)
    for layer in (0, 1):
        for first in (1, 12):
            decode(pool, layer, torch.arange(first, first + 11), 88)
    held = (pool.tier.tables.frame_of >= 0).sum(1).tolist()
    assert held[:2] == [18, 18]
    assert pool.tier.check() == []
    with pytest.raises(ValueError, match=r"a quota must be 16\.\.40 frames a layer, got 3"):
        pool.tier.set_quota(3)


def test_bad_arguments_name_the_fix(pool: Pool) -> None:
    tier = pool.tier
    with pytest.raises(ValueError, match="15 frames are too few; attention needs 16"):
        make_tier(
            SHAPE._replace(num_frames=15), HostStore.memory(SHAPE.host_bytes), backend="reference"
        )
    with pytest.raises(ValueError, match="the host store has 100 bytes"):
        make_tier(SHAPE, HostStore.memory(100), backend="reference")
    with pytest.raises(ValueError, match="layer 3 is not one of 3"):
        pool.write(3, torch.tensor([8]))
    with pytest.raises(ValueError, match=r"slots\[2\] = 11 is token 3 of page 1, which holds 2"):
        pool.write(0, torch.tensor([8, 9, 11]))
    with pytest.raises(ValueError, match=r"slots\[0\] = 192 lies outside"):
        pool.write(0, torch.tensor([192]))
    with pytest.raises(ValueError, match=r"pages outside of 0\.\.23"):
        tier.release(torch.tensor([24]))
    with pytest.raises(ValueError, match=r"frames outside of -1\.\.15"):
        tier.set_victims(torch.tensor([[16]], dtype=torch.int32))
    with pytest.raises(ValueError, match="unknown backend"):
        make_tier(SHAPE, HostStore.memory(SHAPE.host_bytes), backend="cuda")
    assert tier.check() == []
    tier.close()
    tier.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.write(0, torch.tensor([8]))


def test_a_truncated_file_stops_the_tier(tier_backend: str) -> None:
    pool = Pool.make(SHAPE, tier_backend, "file")
    pool.fill(torch.arange(1, 24), 23 * 8)
    pool.tier.drain()
    os.truncate(pool.tier.host.fd, 0)
    with pytest.raises(HostStoreError, match=r"reading 2048 bytes.*shorter than it was made"):
        decode(pool, 2, torch.arange(1, 24), 23 * 8)
    for call in (
        lambda: pool.tier.drain(),
        lambda: pool.write(0, torch.tensor([0])),
        lambda: decode(pool, 2, torch.arange(1, 3), 16),
        lambda: pool.tier.release(torch.tensor([3])),
    ):
        with pytest.raises(HostStoreError, match="shorter than it was made"):
            call()
    pool.tier.close()


def test_a_file_that_takes_nothing_stops_the_tier(tier_backend: str) -> None:
    store = HostStore.file(os.open("/dev/full", os.O_RDWR), SHAPE.host_bytes)
    tier = make_tier(SHAPE, store, backend=tier_backend)
    rows = torch.zeros(8, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(HostStoreError, match=r"writing 2048 bytes.*No space left"):
        tier.write(0, torch.arange(8), rows, rows)
        tier.drain()
    with pytest.raises(HostStoreError, match="No space left"):
        tier.write(0, torch.arange(8), rows, rows)
    assert math.isfinite(tier.counters().bytes_saved)
    tier.close()
