"""Page tiers whose host has int8: the format, and pages that stay until they are full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgl_psa_kernels.page_tier import HostStore, TierShape, codec, make_tier
from test_page_tier import decode
from tier_cases import Pool

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS, SIZE, DIM = 2, 8, 16
SHAPE = TierShape(2, 24, 16, SIZE, HEADS, DIM, torch.float32, torch.int8)


@st.composite
def pages(draw) -> torch.Tensor:
    """K and V [2, Hkv, page_size, D] of any bits, or of numbers of like size with some outliers."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = (2, HEADS, SIZE, DIM)
    if draw(st.booleans()):
        count = 2 * HEADS * SIZE * DIM * dtype.itemsize
        bits = draw(st.binary(min_size=count, max_size=count))
        return torch.frombuffer(bytearray(bits), dtype=dtype).view(shape)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(shape, generator=rng) * 2.0 ** draw(st.integers(-140, 127))
    at = draw(st.integers(0, x.numel() - 1))
    x.view(-1)[at] = draw(st.floats(width=32))
    return x.to(dtype)


def rounded(page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an int8 host makes of a page, and its record."""
    record = codec.encode(*page)
    return codec.decode(record, SHAPE._replace(dtype=page.dtype)), record


@settings(deadline=None)
@given(page=pages())
def test_a_rounded_page_rounds_to_itself(page: torch.Tensor) -> None:
    once, record = rounded(page)
    twice, again = rounded(once)
    assert torch.equal(record, again)
    torch.testing.assert_close(once, twice, rtol=0, atol=0, equal_nan=True)
    assert len(record) == SHAPE._replace(dtype=page.dtype).record_bytes


@settings(deadline=None)
@given(page=pages())
def test_errors_are_half_a_unit_and_units_as_small_as_they_can_be(page: torch.Tensor) -> None:
    low, high = codec.EXPONENTS[page.dtype]
    for x, dim in ((page[0], 1), (page[1], 2)):
        elements, exponents = codec.quantise(x, dim)
        back = codec.dequantise(elements, exponents, dim, x.dtype)
        largest = x.double().abs().amax(dim)
        finite = largest.isfinite()
        assert torch.equal(exponents == codec.NOT_FINITE, ~finite)
        assert back.isnan().all(dim).equal(~finite)
        assert back.isfinite().all(dim).equal(finite)
        used = elements.abs().amax(dim)
        assert int(used.max()) <= 127
        assert ((used >= 64) | (exponents == low) | ~finite).all()
        # Only the uppermost values of a dtype saturate, by less than a unit.
        within = torch.where(exponents == high, 1.0, 0.5) * 2.0 ** exponents.double()
        error = (x.double() - back.double()).abs().amax(dim)
        assert (error <= within)[finite].all()


@settings(deadline=None, max_examples=60)
@given(page=pages(), tail=st.integers(0, SIZE - 1))
def test_kernels_round_as_the_reference(page: torch.Tensor, tail: int) -> None:
    shape = SHAPE._replace(dtype=page.dtype)
    want, record = rounded(page)
    host = HostStore.memory(shape.host_bytes)
    tier = make_tier(shape, host, backend="cpu")
    k, v = page.movedim(1, 2)
    slots = 2 * SIZE + torch.arange(SIZE)
    for part in (slice(tail), slice(tail, SIZE)):
        tier.write(1, slots[part], k[part], v[part])
    frame = int(tier.tables.frame_of[1, 2])
    got = torch.stack([tier.k_frames[frame], tier.v_frames[frame]])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    offset = (24 + 2) * shape.record_bytes
    assert torch.equal(host.read(offset, shape.record_bytes), record)
    assert tier.check() == []
    tier.close()


@pytest.fixture(params=["reference", "cpu"])
def tier_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("host", ["memory", "file"])
def test_frame_and_host_say_the_same(tier_backend: str, host: str) -> None:
    pool = Pool.make(SHAPE, tier_backend, host)
    some, others = torch.arange(1, 4), torch.arange(4, 21)
    pool.fill(some, 3 * SIZE)
    assert (pool.tier.tables.frame_of[0, some] >= 0).all()
    stayed = pool.gather(0, some, 3 * SIZE)
    pool.fill(others, 17 * SIZE)
    pool.tier.set_victims(torch.arange(16, dtype=torch.int32)[None])
    for page in range(4, 20):
        decode(pool, 1, torch.tensor([page]), SIZE)
    assert (pool.tier.tables.frame_of[0, some] < 0).all()
    assert torch.equal(pool.gather(0, some, 3 * SIZE), stayed)
    decode(pool, 0, some, 3 * SIZE)
    assert (pool.tier.tables.frame_of[0, some] >= 0).all()
    assert torch.equal(pool.gather(0, some, 3 * SIZE), stayed)
    assert torch.equal(stayed, pool.truth(0, some, 3 * SIZE))
    pool.tier.drain()
    assert pool.tier.check() == []


def test_open_pages_keep_their_frames(tier_backend: str) -> None:
    pool = Pool.make(SHAPE, tier_backend)
    open_pages = torch.tensor([1, 2, 3])
    for page in open_pages.tolist():
        pool.fill(torch.tensor([page]), 5)
    frames = pool.tier.tables.frame_of[:, open_pages].clone()
    pool.fill(torch.arange(4, 24), 20 * SIZE)
    for step in range(1, 4):
        pool.tier.set_victims(torch.arange(16, dtype=torch.int32)[None])
        for layer in range(2):
            for page in range(4, 24):
                decode(pool, layer, torch.tensor([page]), SIZE, step)
    assert torch.equal(pool.tier.tables.frame_of[:, open_pages], frames)
    assert pool.tier.counters().recycled > 0
    assert (pool.tier.tables.saved[:, open_pages] == 0).all()
    pool.tier.drain()
    assert pool.tier.check() == []


def test_open_pages_that_leave_no_frames_are_an_error(tier_backend: str) -> None:
    pool = Pool.make(SHAPE, tier_backend)
    pool.fill(torch.arange(20, 24), 4 * SIZE)
    for page in range(1, 9):
        pool.write(0, torch.tensor([page * SIZE]))
    decode(pool, 0, torch.arange(20, 24), 4 * SIZE)
    pool.write(1, torch.tensor([9 * SIZE]))  # Eight frames are a block, seven are not.
    with pytest.raises(RuntimeError, match=r"layer 1 finds no frame: 9 frames hold pages that are"):
        decode(pool, 1, torch.arange(20, 24), 4 * SIZE)
    for page in range(10, 17):
        pool.write(1, torch.tensor([page * SIZE]))
    with pytest.raises(RuntimeError, match=r"layer 0 finds no frame: 16 .* give the device tier"):
        pool.tier.write(0, torch.tensor([17 * SIZE]), *torch.zeros(2, 1, HEADS, DIM))
    assert pool.tier.check() == []
    pool.tier.release(torch.arange(1, 10))
    decode(pool, 0, torch.arange(20, 24), 4 * SIZE)
    assert pool.tier.check() == []


def test_tiers_that_find_frames_need_not_be_told_of_open_pages(tier_backend: str) -> None:
    pool = Pool.make(SHAPE, tier_backend)
    pool.tier.set_open_pages(1)
    for page in range(1, 4):
        pool.fill(torch.tensor([page]), 5)
    assert pool.tier.check() == []
    with pytest.raises(ValueError, match="0 open pages are too few"):
        pool.tier.set_open_pages(0)
    with pytest.raises(ValueError, match="9 open pages of 2 layers need 18 frames, there are 16"):
        pool.tier.set_open_pages(9)


def test_a_layers_quota_counts_its_open_pages(tier_backend: str) -> None:
    pool = Pool.make(SHAPE._replace(num_frames=32), tier_backend)
    pool.tier.set_quota(16)
    pool.fill(torch.tensor([20]), SIZE)
    for page in range(1, 10):
        pool.write(0, torch.tensor([page * SIZE]))
    decode(pool, 1, torch.tensor([20]), SIZE)
    with pytest.raises(RuntimeError, match="layer 0 finds no frame: 9 frames"):
        decode(pool, 0, torch.tensor([20]), SIZE)


def test_other_elements_are_refused() -> None:
    store = HostStore.memory(SHAPE.host_bytes)
    with pytest.raises(ValueError, match=r"in torch.float32 or torch.int8, not torch.float16"):
        make_tier(SHAPE._replace(host_dtype=torch.float16), store, backend="cpu")
    assert SHAPE.record_bytes < 0.35 * SHAPE.frame_bytes
