"""The page tier in Triton over an int8 host: records, open pages, and the frames set aside."""

from __future__ import annotations

import pytest
import torch
from sgl_psa_kernels.page_tier import TierShape, TritonTier, codec, triton_open_pages
from sgl_psa_kernels.page_tier.shape import ASIDE
from test_triton_tier import FP16, FP32, LateStreams, attention, frames_hold_their_pages, make_pool
from tier_cases import Pool

__all__ = ["attention"]

BF16, INT8 = torch.bfloat16, torch.int8
SHAPE = TierShape(2, 21, 16, 8, 2, 16, FP16, INT8)


def spare(pool: Pool) -> int:
    """Frames set aside that no page has."""
    return int(pool.tier.traffic.open_pages._spare[0])


def extremes(shape: TierShape, seed: int) -> torch.Tensor:
    """K and V [2, pages, Hkv, page_size, D] of all magnitudes of the dtype, with zeros, the largest
    numbers, halfway cases of rounding, infinities and NaN."""
    rng = torch.Generator().manual_seed(seed)
    size = (2, shape.num_pages, *shape.page_shape)
    low, high = codec.EXPONENTS[shape.dtype]
    scale = torch.randint(low - 12, high + 8, (*size[:3], 1, 1), generator=rng)
    x = torch.randn(size, generator=rng).double() * 2.0**scale
    # From the third page on: one exponent decides, so that halves are rounded to even.
    x[:, 2:5] = torch.randint(-255, 256, x[:, 2:5].shape, generator=rng).double() / 2
    x[:, 3] *= 2.0**low
    largest = torch.finfo(shape.dtype).max
    x[:, 5] = torch.where(torch.rand(x[:, 5].shape, generator=rng) < 0.5, largest, -largest)
    x[:, 6] = 0.0
    x = x.clamp(-largest, largest).to(shape.dtype)
    for page, value in ((7, float("inf")), (8, float("nan")), (9, -float("inf"))):
        x[:, page, 0, 3, 5] = value
    return x


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        (TierShape(1, 12, 16, 8, 2, 16, BF16, INT8), 4096),
        (TierShape(1, 12, 16, 16, 1, 80, FP16, INT8), 1024),
        (TierShape(1, 12, 16, 8, 1, 48, FP32, INT8), 4096),
    ],
    ids=str,
)
def test_records_are_those_of_the_codec(
    shape: TierShape, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pages written whole, and in two parts: bit for bit, with what attention, prefill and
    copies to frames make of them."""
    monkeypatch.setattr(triton_open_pages, "TILE", tile)
    tier = make_pool(shape).tier
    pages, size = extremes(shape, 3), shape.page_size
    rows = pages.movedim(2, 3).flatten(1, 2)
    slots = torch.arange(shape.num_pages * size)
    parts = [slots[: 6 * size], *slots[6 * size : 7 * size].split(size // 2 + 1), slots[7 * size :]]
    for part in parts:
        tier.write(0, part, rows[0, part], rows[1, part])
    want = torch.stack([codec.decode(codec.encode(*pages[:, i]), shape) for i in range(12)], 1)
    for page in range(shape.num_pages):
        record = tier.host.read(page * shape.record_bytes, shape.record_bytes)
        assert torch.equal(record, codec.encode(*pages[:, page])), page
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    got = torch.empty_like(rows)
    tier.gather(0, torch.arange(shape.num_pages), len(slots), got[0], got[1])
    torch.testing.assert_close(got, want.movedim(2, 3).flatten(1, 2), **same)
    for first in range(0, shape.num_pages, 2):
        tier.places.copy(torch.tensor([first, first + 1]), torch.tensor([1, 0]))
        held = torch.stack([tier.k_frames[[1, 0]], tier.v_frames[[1, 0]]])
        torch.testing.assert_close(held, want[:, first : first + 2], **same)


def test_rows_of_pages_may_come_in_any_mixture() -> None:
    """Interleaved pages, some begun, some gone on with, some full by it, and padding twice."""
    pool = make_pool(SHAPE)
    for layer in range(2):
        pool.write(layer, torch.tensor([3 * 8, 4 * 8, 3 * 8 + 1]))
        rows = [4 * 8 + i for i in range(1, 8)] + [3 * 8 + i for i in range(2, 7)]
        rows += [5 * 8 + i for i in range(8)] + [6 * 8 + i for i in range(5)]
        turns = torch.tensor(rows)[torch.randperm(len(rows), generator=pool.rng)] // 8
        # Pages in any order, tokens of each in theirs.
        tokens = {page: iter([slot for slot in rows if slot // 8 == page]) for page in (3, 4, 5, 6)}
        pool.write(layer, torch.tensor([next(tokens[page]) for page in turns.tolist()]))
    assert spare(pool) == 8 - 2 * 2
    for page, tokens in ((3, 7), (4, 8), (5, 8), (6, 5)):
        some = torch.tensor([page])
        for layer in range(2):
            assert torch.equal(pool.gather(layer, some, tokens), pool.truth(layer, some, tokens))
    # Rows of padding go to one slot, of a page that nobody releases.
    for _ in range(3):
        pool.tier.write(0, torch.zeros(4, dtype=torch.int64), *torch.ones(2, 4, 2, 16).half())
    assert spare(pool) == 8 - 2 * 2 - 1
    assert pool.tier.check() == []
    pool.tier.release(torch.arange(7))
    assert pool.tier.check() == [] and spare(pool) == 8


def test_a_page_that_fills_leaves_its_frame_and_comes_back_rounded(attention) -> None:
    pool = make_pool(SHAPE._replace(num_layers=1))
    tier = pool.tier
    pool.fill(torch.tensor([3]), 6)
    exact = pool.gather(0, torch.tensor([3]), 6)
    for step, length in ((1, 6), (2, 7), (3, 8), (4, 8), (5, 8)):
        if length > 6 and step < 4:
            pool.write(0, torch.tensor([3 * 8 + length - 1]))
        attention.decode(pool, 0, step, [([3], length)])
        assert (int(tier.tables.frame_of[0, 3]) >= 0) == (step > 3)
        assert spare(pool) == 8 - (length < 8)
    tier.drain()
    counters, heads = tier.counters(), SHAPE.num_kv_heads
    assert (counters.loads, counters.hits) == (1, 3 * heads)
    page_bytes = SHAPE.record_bytes // heads
    assert counters.bytes_read_through == 2 * heads * page_bytes
    assert tier.misses(counters) == 2 * heads
    frames_hold_their_pages(pool)
    assert not torch.equal(pool.gather(0, torch.tensor([3]), 6), exact)
    assert tier.check() == []


def test_open_pages_without_frames_stop_the_tier_a_step_later(attention) -> None:
    pool = make_pool(SHAPE)
    pool.tier.set_open_pages(2)
    attention.lenient = True
    for page in (1, 2, 3):
        pool.fill(torch.tensor([page]), 5)
    for layer in range(2):
        attention.decode(pool, layer, 1, [([1], 5)])
    with pytest.raises(RuntimeError, match=r"finds no frame: 4 frames hold pages .* is wrong"):
        attention.decode(pool, 0, 2, [([1], 5)])


def test_frames_are_set_aside_for_as_many_pages_as_there_can_be(attention) -> None:
    pool = make_pool(SHAPE)
    tier, owner = pool.tier, pool.tier.tables.owner
    assert int((owner == ASIDE).sum()) == SHAPE.num_frames // 2
    pool.fill(torch.tensor([1]), 3)
    tier.set_open_pages(7)
    assert int((owner == ASIDE).sum()) == 14 and spare(pool) == 12
    tier.set_open_pages(3)
    assert int((owner == ASIDE).sum()) == 6 and spare(pool) == 4
    assert tier.check() == []
    for page in range(2, 4):
        pool.fill(torch.tensor([page]), 3)
    assert spare(pool) == 0
    # No fewer than open pages have.
    tier.set_open_pages(2)
    assert int((owner == ASIDE).sum()) == 6
    for page in range(1, 4):
        for layer in range(2):
            truth = pool.truth(layer, torch.tensor([page]), 3)
            assert torch.equal(pool.gather(layer, torch.tensor([page]), 3), truth)
    tier.release(torch.tensor([1, 2, 3]))
    tier.set_open_pages(1)
    assert int((owner == ASIDE).sum()) == spare(pool) == 2
    with pytest.raises(ValueError, match="9 open pages of 2 layers need 18 frames, there are 16"):
        tier.set_open_pages(9)
    pages = list(range(4, 12))
    pool.fill(torch.tensor(pages), 64)
    for step in (1, 2, 3):
        for layer in range(2):
            attention.decode(pool, layer, step, [(pages, 64)])
    tier.drain()
    assert int((owner >= 0).sum()) == 14
    with pytest.raises(RuntimeError, match=r"2 more frames .* 0 are free; set them aside before"):
        tier.set_open_pages(2)
    assert tier.check() == []


def test_pages_are_fetched_ahead_once_they_are_known_to_be_full(attention) -> None:
    pool = make_pool(SHAPE, streams=LateStreams())
    pages = torch.tensor([1, 2, 3])
    pool.fill(pages, 21)
    pool.tier.drain()
    assert pool.tier.prefetch(1, pages) == 2
    pool.tier.drain()
    frames_hold_their_pages(pool)
    assert pool.tier.check() == []
    assert isinstance(pool.tier, TritonTier)
