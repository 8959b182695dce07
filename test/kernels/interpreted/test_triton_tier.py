"""The page tier in Triton: bit for bit the resident pool, whatever lies where."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from late_streams import LateStreams
from sgl_psa_kernels.page_tier import HostStore, TierShape, TritonTier, codec, triton_writes
from sgl_psa_kernels.page_tier import shape as tier_shape
from sgl_psa_kernels.progressive_decode import progressive_decode
from sgl_psa_kernels.progressive_decode import triton_backend as decode_backend
from tier_cases import Pool

FP16, FP32 = torch.float16, torch.float32
SHAPE = TierShape(2, 21, 16, 8, 2, 16, FP16)
#: Dense, marginal and coverage.
RULES = ((0, 0.0, 0.0, 0.0), (1, -1.0, 0.0, 0.0), (2, -1.0, 0.0, 1.0))
#: Pages in a group of each.
GROUPS = {TierShape(1, 13, 8, 16, 1, 80, FP16): 2, TierShape(1, 7, 2, 64, 1, 32, FP32): 4}


def make_pool(shape: TierShape, pipeline: bool = True, streams=None, seed: int = 0) -> Pool:
    tier = TritonTier(shape, HostStore.memory(shape.host_bytes), pipeline, streams)
    # What was never written must not be read.
    tier.k_frames.fill_(float("nan"))
    tier.v_frames.fill_(float("nan"))
    size = (shape.num_layers, shape.num_pages * shape.page_size, shape.num_kv_heads, shape.head_dim)
    k = torch.full(size, float("nan"), dtype=shape.dtype)
    return Pool(tier, k, k.clone(), torch.Generator().manual_seed(seed))


@dataclass
class Rows:
    """Arguments of decode for rows (pages, length)."""

    table: torch.Tensor
    lens: torch.Tensor
    rest: tuple[torch.Tensor | None, ...]
    q: torch.Tensor

    @classmethod
    def make(cls, pool: Pool, rows, rule) -> Rows:
        shape, count = pool.shape, len(rows)
        width = max(len(pages) for pages, _ in rows) + 1
        table = torch.full((count, width), 2**30, dtype=torch.int32)
        for row, (pages, _) in enumerate(rows):
            table[row, : len(pages)] = torch.as_tensor(pages)
        lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
        heads = 2 * shape.num_kv_heads
        q = torch.randn(count, heads, shape.head_dim, generator=pool.rng).to(shape.dtype)
        mass = 2 * torch.randn(count, heads, width, generator=pool.rng) if rule[0] else None
        columns = (torch.full((count,), x) for x in rule[1:])
        return cls(table, lens, (mass, torch.full((count,), rule[0]).int(), *columns), q)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [(shape, rule) for shape in GROUPS for rule in RULES]
    + [(shape._replace(host_dtype=torch.int8), RULES[2]) for shape in GROUPS],
    ids=str,
)
def test_attention_is_that_of_the_resident_pool(shape: TierShape, rule) -> None:
    """Pages on the host, then in frames in part; groups of 4 are split over programs."""
    pool = make_pool(shape)
    tokens = (shape.num_pages - 1) * shape.page_size - 2
    pages = torch.randperm(shape.num_pages - 1, generator=pool.rng) + 1
    pool.fill(pages, tokens)
    assert torch.equal(pool.gather(0, pages, tokens), pool.truth(0, pages, tokens))
    rows = Rows.make(pool, [(pages, tokens)], rule)
    options = {"sink_pages": 1, "recent_pages": 1}
    options["group_pages"] = GROUPS[shape._replace(host_dtype=None)]
    options |= {"sm_scale": shape.head_dim**-0.5}
    flags = torch.full((2, 1, 1, rows.table.shape[1]), 7, dtype=torch.uint8)
    want = progressive_decode(
        rows.q, pool.k[0], pool.v[0], rows.table, rows.lens, *rows.rest, attended=flags[1],
        page_size=shape.page_size, backend="triton", **options,
    )  # fmt: skip
    stats = torch.empty(1, 1, 6)
    for step in (1, 3):
        given = (rows.q, rows.table, rows.lens, *rows.rest)
        got = pool.tier.decode(0, step, *given, attended=flags[0], stats=stats, **options)
        assert all(map(torch.equal, got, want)) and got[2] is stats
        assert torch.equal(flags[0], flags[1])
        pool.tier.traffic.begin()
    counters = pool.tier.counters()
    assert counters.loads > 0 and counters.hits > 0 and counters.bytes_read_through > 0
    assert pool.tier.check() == []


def page_at(frames: torch.Tensor, place: int, shape: TierShape) -> torch.Tensor:
    """[2, Hkv, page_size, D] of the record that begins there."""
    at = place * 16 * shape.dtype.itemsize
    away = shape.int8_host and not 0 <= at < shape.num_frames * shape.frame_bytes
    size = shape.record_bytes if away else shape.frame_bytes
    record = (ctypes.c_char * size).from_address(frames.data_ptr() + at)
    if away:
        return codec.decode(torch.frombuffer(record, dtype=torch.uint8), shape)
    return torch.frombuffer(record, dtype=shape.dtype).view(2, *shape.page_shape)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of attention, which takes seconds here: each page that is ``chosen`` is found where
    its place says, equal to the truth."""
    self = SimpleNamespace(pool=None, layer=0, chosen=lambda shape: torch.ones(shape))

    def attend(
        *, q, k_cache, v_cache, page_table, seq_lens, attended, place, page_size, **_: object
    ):
        k, v, shape = k_cache, v_cache, self.pool.shape
        attended.zero_()
        part = shape.frame_bytes // 2
        assert (v.data_ptr() - k.data_ptr()) == part
        for row, length in enumerate(seq_lens.tolist()):
            count = -(-length // page_size)
            flags = self.chosen((shape.num_kv_heads, count))
            flags[:, -1:] = 1
            attended[row, :, :count] = flags
            for at in torch.nonzero(flags.any(0)).flatten().tolist():
                page = int(page_table[row, at])
                held = page_at(k, int(place[page]), shape)
                tokens = min(page_size, length - at * page_size)
                truth = self.pool.truth(self.layer, torch.tensor([page]), tokens)
                if not self.lenient:
                    assert torch.equal(held[:, :, :tokens].movedim(1, 2), truth)
        size = (*attended.shape[:2], 6)
        return q.clone(), torch.zeros(q.shape[:2]), torch.zeros(size)

    self.lenient = False
    monkeypatch.setattr(decode_backend, "progressive_decode", attend)

    def decode(pool: Pool, layer: int, step: int, rows) -> None:
        self.pool, self.layer = pool, layer
        made = Rows.make(pool, rows, RULES[0])
        options = {"sink_pages": 1, "recent_pages": 1, "group_pages": 2, "sm_scale": 1.0}
        pool.tier.decode(layer, step, made.q, made.table, made.lens, *made.rest, **options)

    self.decode = decode
    return self


def frames_hold_their_pages(pool: Pool) -> None:
    tier, shape = pool.tier, pool.shape
    for frame, key in enumerate(tier.tables.owner.tolist()):
        layer, page = divmod(key, shape.num_pages)
        filled = int(tier.tables.filled[layer, page]) if key >= 0 else 0
        truth = pool.truth(layer, torch.tensor([page]), filled)
        held = torch.stack([tier.k_frames[frame], tier.v_frames[frame]])
        assert torch.equal(held[:, :, :filled].movedim(1, 2), truth)


def test_pages_come_a_step_after_they_were_attended_and_stay(attention) -> None:
    pool = make_pool(SHAPE)
    pages = list(range(1, 8))
    pool.fill(torch.tensor(pages), 55)
    tier = pool.tier
    for layer in range(2):
        attention.decode(pool, layer, 1, [(pages, 55), (pages[:3], 24)])
    first = tier.counters()
    assert (first.hits, first.loads) == (0, 0)
    for layer in range(2):
        attention.decode(pool, layer, 2, [(pages, 55)])
    # The open page was there for step 2, the others were being copied.
    second = tier.counters()
    assert second.loads == 14 and second.bytes_loaded == 14 * SHAPE.record_bytes
    for layer in range(2):
        attention.decode(pool, layer, 3, [(pages, 55)])
    tier.drain()
    third = tier.counters()
    pairs = SHAPE.num_kv_heads * SHAPE.num_layers
    assert third.hits == pairs * (1 + 7)
    page_bytes = SHAPE.record_bytes // SHAPE.num_kv_heads
    assert third.bytes_read_through == pairs * (7 + 3 + 6) * page_bytes
    assert third.loads == 14 and third.evictions == 0
    assert tier.tables.stamp[:, 1:8].eq(3).all() and int(tier.tables.stamp.sum()) == 3 * 14
    assert tier.tables.filled[0, :9].tolist() == [0, *[8] * 6, 7, 0]
    frame = int(tier.tables.frame_of[1, 7])
    assert int(tier.tables.uses[frame]) == 2 * SHAPE.num_kv_heads
    assert tier.check() == []
    frames_hold_their_pages(pool)


def test_a_working_set_beyond_the_arena_does_not_push_itself_out(attention) -> None:
    pool = make_pool(SHAPE)
    pages = list(range(1, 21))
    pool.fill(torch.tensor(pages), 160)
    for step in range(1, 6):
        for layer in range(2):
            attention.decode(pool, layer, step, [(pages, 160)])
    counters = pool.tier.counters()
    assert counters.loads == SHAPE.num_frames and counters.evictions == 0
    assert pool.tier.check() == []


def test_victims_go_in_their_order_and_recent_ones_stay(attention) -> None:
    shape = SHAPE._replace(num_layers=1)
    pool = make_pool(shape)
    tier = pool.tier
    pages = list(range(1, 17))
    pool.fill(torch.tensor(pages), 128)
    for step in (1, 2, 3):
        attention.decode(pool, 0, step, [(pages, 128)])
    frame_of = tier.tables.frame_of
    pool.fill(torch.arange(17, 20), 24)
    order = frame_of[0, [5, 5, 9, 2]]
    tier.set_victims(order[None])
    attention.decode(pool, 0, 4, [([5, 17, 18, 19], 32)])
    attention.decode(pool, 0, 5, [([5], 8)])
    # 5 was attended; 9 and 2 made room, and one more in rotation.
    assert int(frame_of[0, 5]) >= 0
    assert (frame_of[0, [9, 2]] < 0).all() and (frame_of[0, 17:20] >= 0).all()
    counters = tier.counters()
    assert (counters.evictions, counters.recycled, counters.loads) == (3, 1, 19)
    attention.decode(pool, 0, 6, [(pages, 128)])
    assert tier.check() == []
    frames_hold_their_pages(pool)


def test_a_layer_at_its_quota_takes_its_own_frames(attention) -> None:
    pool = make_pool(SHAPE._replace(num_frames=24))
    pool.tier.set_quota(16)
    pages = list(range(1, 21))
    pool.fill(torch.tensor(pages), 160)
    for step in range(1, 7):
        half = pages[:10] if step < 4 else pages[10:]
        attention.decode(pool, 0, step, [(half, 80)])
        attention.decode(pool, 1, step, [(pages[:2], 16)])
    held = (pool.tier.tables.frame_of >= 0).sum(1).tolist()
    assert held == [16, 2]
    assert pool.tier.counters().evictions == 4
    assert pool.tier.check() == []


def test_a_page_that_is_too_short_stops_the_tier_a_step_later(attention) -> None:
    pool = make_pool(SHAPE)
    pool.fill(torch.tensor([1, 2]), 12)
    attention.lenient = True
    attention.decode(pool, 0, 1, [([1, 2], 13)])
    attention.decode(pool, 1, 1, [([1, 2], 12)])
    with pytest.raises(RuntimeError, match="page 2 of layer 0 held fewer tokens"):
        attention.decode(pool, 0, 2, [([1, 2], 12)])
    with pytest.raises(RuntimeError, match="page 2 of layer 0 held fewer tokens"):
        pool.write(0, torch.tensor([0]))


def test_released_pages_leave_their_frames_and_can_be_written_anew(attention) -> None:
    pool = make_pool(SHAPE)
    pages = list(range(1, 9))
    for life in range(3):
        pool.fill(torch.tensor(pages), 61)
        for step in range(3 * life + 1, 3 * life + 4):
            for layer in range(2):
                attention.decode(pool, layer, step, [(pages, 61)])
        pool.tier.release(torch.tensor(pages))
        assert (pool.tier.tables.owner == -1).all()
        assert pool.tier.check() == []
        assert int(pool.tier.tables.filled.sum()) == int(pool.tier.tables.stamp.sum()) == 0
    pool.tier.clear()
    pool.tier.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.write(0, torch.tensor([0]))


def test_a_page_that_began_anew_is_not_brought_as_what_it_was(attention) -> None:
    """A full page is attended, released and begun anew before the host hears of the first; copied
    then, its frame would lack the tokens written behind the copy."""
    streams = LateStreams()
    pool = make_pool(SHAPE, streams=streams)
    pool.fill(torch.tensor([3]), 8)
    for layer in range(2):
        attention.decode(pool, layer, 1, [([3], 8)])
    pool.tier.release(torch.tensor([3]))
    pool.fill(torch.tensor([3]), 2)
    for step, length in ((2, 2), (3, 3), (4, 4)):
        streams.run()
        for layer in range(2):
            attention.decode(pool, layer, step, [([3], length)])
        streams.run()
        for layer in range(2):
            pool.write(layer, torch.tensor([3 * 8 + length]))
    assert pool.tier.check() == []
    assert pool.tier.counters().loads == 2


@pytest.mark.parametrize("host_dtype", [None, torch.int8])
def test_a_prompt_is_written_beside_the_layers_that_follow(
    host_dtype, attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for it but what reads, writes or moves the same pages."""
    monkeypatch.setattr(triton_writes, "BESIDE_TOKENS", 8)
    streams = LateStreams()
    pool = make_pool(SHAPE._replace(host_dtype=host_dtype), streams=streams)
    pages = torch.arange(1, 8)
    slots = pool.slots(pages)
    for layer in range(2):
        pool.write(layer, slots[:30])
        assert streams.waiting == layer + 1
    # The prompt goes on: the first chunk is read, the second one written.
    assert torch.equal(pool.gather(0, pages, 30), pool.truth(0, pages, 30))
    assert streams.waiting == 1
    for layer in range(2):
        pool.write(layer, slots[30:46])
    assert streams.waiting == 2  # In order: that of layer 1 has run.
    pool.write(0, slots[46:47])
    assert streams.waiting == 1
    pool.write(1, slots[46:47])
    for layer in range(2):
        pool.write(layer, slots[47:])
    attention.decode(pool, 0, 1, [(pages.tolist(), 56)])
    assert streams.waiting == 0  # A step begins, and places may change in every layer.
    attention.decode(pool, 1, 1, [(pages.tolist(), 56)])
    assert torch.equal(pool.gather(1, pages, 56), pool.truth(1, pages, 56))
    # Another request gets pages whose first tokens are still being written.
    for layer in range(2):
        pool.write(layer, pool.slots(torch.tensor([9])))
    pool.tier.release(torch.tensor([9]))
    for layer in range(2):
        pool.write(layer, torch.tensor([72]))
        pool.tier.traffic.settle()
        assert pool.tier.state.pages[0, :, 9].tolist() == [1, layer]
    assert pool.tier.check() == []


@pytest.mark.parametrize(("seed", "host_dtype"), [(0, None), (1, None), (2, None), (0, torch.int8)])
def test_random_requests_with_copies_that_end_at_any_time(
    seed: int, host_dtype, attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come, share a prefix, grow and go; side work, writes of more than one token among
    it, runs at random points in between."""
    monkeypatch.setattr(triton_writes, "BESIDE_TOKENS", 2)
    monkeypatch.setattr(tier_shape, "BLOCK_TOKENS", 8)  # A small arena: frames change hands.
    shape = TierShape(2, 25, (6, 10, 24)[seed], 8, 1, 16, FP16, host_dtype)
    if shape.int8_host:  # Three requests, a page of each and layer.
        shape = shape._replace(num_frames=shape.num_frames + 6)
    streams = LateStreams()
    pool = make_pool(shape, pipeline=seed != 2, streams=streams, seed=seed)
    pool.tier.set_open_pages(3)
    attention.chosen = lambda size: torch.rand(size, generator=pool.rng) < 0.25
    choose = random.Random(seed)
    free = list(range(1, shape.num_pages))
    choose.shuffle(free)
    prefix = [free.pop(), free.pop()]
    pool.fill(torch.tensor(prefix), 16)
    requests: list[list] = []
    for step in range(1, 25):
        if len(requests) < 3 and len(free) >= 4:
            own = [free.pop() for _ in range(choose.randint(1, 4))]
            length = 16 + choose.randint(8 * len(own) - 7, 8 * len(own))
            for layer in range(2):
                pool.write(layer, pool.slots(torch.tensor(own))[: length - 16])
            requests.append([prefix + own, length])
        for request in requests:
            if request[1] == 8 * len(request[0]) and free:
                request[0].append(free.pop())
        requests = [r for r in requests if r[1] < 8 * len(r[0])] or requests[:1]
        grown = [r for r in requests if r[1] < 8 * len(r[0])]
        new = torch.tensor([r[0][r[1] // 8] * 8 + r[1] % 8 for r in grown])
        for request in grown:
            request[1] += 1
        for layer in range(2):
            streams.run(choose.choice((0, 1, 1, 2)))
            if len(new):
                pool.write(layer, new)
            streams.run(choose.choice((0, 0, 1)))
            attention.decode(pool, layer, step, [tuple(r) for r in requests])
        held = set(prefix).union(*(r[0] for r in requests))
        gone = [p for p in range(1, shape.num_pages) if p not in held and p not in free]
        if choose.random() < 0.4 and requests:
            gone += requests.pop(choose.randrange(len(requests)))[0][2:]
        if gone:
            pool.tier.release(torch.tensor(gone))
            free += gone
            choose.shuffle(free)
        if choose.random() < 0.3:
            frames = torch.randperm(shape.num_frames, generator=pool.rng)[None, :9]
            pool.tier.set_victims(frames.int())
    assert pool.tier.check() == []
    frames_hold_their_pages(pool)
    counters = pool.tier.counters()
    assert counters.loads > 20 and counters.hits > 0
    assert seed == 2 or counters.evictions > 5
    pool.tier.clear()
    assert pool.tier.check() == []


def test_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="host store in memory"):
        TritonTier(SHAPE, HostStore.file(0, SHAPE.host_bytes), True)
