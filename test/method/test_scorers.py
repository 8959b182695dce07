"""Every scorer against the true page masses: guarantees, bytes, staleness, purity."""

from __future__ import annotations

import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgl_psa_kernels.candidate_pages import candidate_pages

from sgl_psa.config import ConfigError, PSAConfig, ScorerName
from sgl_psa.policies import legal
from sgl_psa.scorers import SCORERS, CacheShape, Scorer, make_scorer
from sgl_psa.scorers.base import PageBatch
from sgl_psa.scorers.two_level import TwoLevelScorer
from test.method.cache import PAGE, Cache, make_cache

KV_HEADS, GROUP, DIM = 2, 3, 64
SCALE = DIM**-0.5
LENGTHS = [40 * PAGE + 7, 3 * PAGE, 1]


def config_of(name: str, **fields) -> PSAConfig:
    return PSAConfig(scorer=typing.cast(ScorerName, name), **fields)


def filled(config: PSAConfig, cache: Cache, backend: str) -> Scorer:
    shape = CacheShape(1, cache.num_pages, PAGE, *cache.k.shape[1:], torch.device("cpu"))
    scorer = make_scorer(config, shape, backend)
    for row in range(len(cache.seq_lens)):
        scorer.on_write(0, cache.tokens(row), cache.k)
    return scorer


def batch_of(cache: Cache) -> PageBatch:
    """Every row, active; garbage behind the last page of a row."""
    table = torch.div(cache.req_to_token[:, ::PAGE], PAGE, rounding_mode="floor")
    active = torch.ones(len(cache.seq_lens), dtype=torch.uint8)
    return PageBatch(table.int().contiguous(), cache.seq_lens.int(), active)


def spiky(seed: int) -> tuple[Cache, torch.Tensor]:
    """Keys of which one in forty points along a query of its KV head, and those queries."""
    cache = make_cache(LENGTHS, KV_HEADS, DIM, seed, sharp=0.5)
    rng = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(len(LENGTHS), KV_HEADS * GROUP, DIM, generator=rng)
    for row in range(len(LENGTHS)):
        slots = cache.tokens(row)
        for i in range(20, len(slots), 40):
            head = int(torch.randint(0, KV_HEADS * GROUP, (), generator=rng))
            cache.k[slots[i], head // GROUP] += q[row, head]
    return cache, q


def plain(seed: int) -> tuple[Cache, torch.Tensor]:
    cache = make_cache(LENGTHS, KV_HEADS, DIM, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    return cache, torch.randn(len(LENGTHS), KV_HEADS * GROUP, DIM, generator=rng)


CACHES = {"plain": plain, "spiky": spiky}
SUMMARIES = [name for name in SCORERS if legal.is_page_summary(name)]


def true_log_mass(cache: Cache, q: torch.Tensor, row: int) -> torch.Tensor:
    """float64 [Hq, pages] of a row."""
    keys = cache.k[cache.tokens(row)].double().repeat_interleave(GROUP, 1)
    logits = SCALE * torch.einsum("hd,thd->ht", q[row].double(), keys)
    return torch.stack([part.logsumexp(1) for part in logits.split(PAGE, 1)], 1)


def errors(config: PSAConfig, cache: Cache, q: torch.Tensor, backend: str) -> torch.Tensor:
    """Estimate less true log mass of every page and head of all rows."""
    got = filled(config, cache, backend).score(0, q, batch_of(cache), SCALE).double()
    rows = []
    for row in range(len(LENGTHS)):
        want = true_log_mass(cache, q, row)
        rows.append((got[row, :, : want.shape[1]] - want).flatten())
    return torch.cat(rows)


def test_the_table_and_the_setting_name_the_same_scorers() -> None:
    assert list(SCORERS) == list(typing.get_args(ScorerName))
    assert all(scorer.name == name for name, scorer in SCORERS.items())


@pytest.mark.parametrize("keys", CACHES)
def test_exact_is_the_true_mass(backend, keys) -> None:
    assert errors(config_of("exact"), *CACHES[keys](1), backend).abs().max() < 1e-4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("keys", CACHES)
def test_box_is_never_below_the_true_mass(backend, keys, bits) -> None:
    error = errors(config_of("box", summary_bits=bits), *CACHES[keys](2), backend)
    assert error.min() >= -1e-4 and error.max() > 1


@pytest.mark.parametrize("keys", CACHES)
def test_mean_is_never_above_the_true_mass(backend, keys) -> None:
    # bfloat16 means: half a unit in the last place, on logits of a few nats.
    assert errors(config_of("mean"), *CACHES[keys](3), backend).max() < 0.02


def test_moments_are_calibrated_on_ordinary_keys(backend) -> None:
    cache, q = plain(4)
    gaussian = errors(config_of("gaussian"), cache, q, backend)
    mean = errors(config_of("mean"), cache, q, backend)
    assert gaussian.mean().abs() < 0.1 and gaussian.abs().mean() < 0.7 * mean.abs().mean()


def test_cuboid_mean_sees_spikes_that_moments_miss(backend) -> None:
    cache, q = spiky(5)
    worst = {name: errors(config_of(name), cache, q, backend).min() for name in SCORERS}
    assert worst["cuboid_mean"] > worst["mean"] + 1
    assert worst["hybrid"] >= max(worst["cuboid_mean"], worst["gaussian"]) - 1e-4


def test_hybrid_is_the_sum_of_its_two_parts(backend) -> None:
    cache, q = spiky(6)
    names = ("hybrid", "gaussian", "cuboid_mean")
    hybrid, gaussian, cuboid = (errors(config_of(n), cache, q, backend) for n in names)
    torch.testing.assert_close(hybrid, torch.logaddexp(gaussian, cuboid), rtol=0, atol=1e-4)


@pytest.mark.parametrize("keys", CACHES)
def test_more_bits_are_closer_and_rotation_beats_plain_codes(backend, keys) -> None:
    cache, q = CACHES[keys](7)
    error = {
        (name, bits): errors(config_of(name, sketch_bits=bits), cache, q, backend).abs().mean()
        for name in ("sketch", "rotated_sketch")
        for bits in (1, 2, 4)
    }
    for name in ("sketch", "rotated_sketch"):
        assert error[name, 1] > error[name, 2] > error[name, 4]
    assert error["rotated_sketch", 2] < 0.8 * error["sketch", 2]
    assert error["rotated_sketch", 2] < 0.12 and error["rotated_sketch", 4] < 0.03


def test_rotated_sketches_survive_one_huge_dimension(backend) -> None:
    """A key channel far from zero, as real models have, takes the range of plain codes."""
    cache, q = plain(8)
    cache.k[..., 11] += 25.0
    q[..., 11] = 0.1
    plain_codes = errors(config_of("sketch"), cache, q, backend).abs().mean()
    rotated = errors(config_of("rotated_sketch"), cache, q, backend).abs().mean()
    assert rotated < 0.6 * plain_codes


def test_two_level_with_every_page_a_candidate_is_the_second_level(backend) -> None:
    cache, q = spiky(9)
    config = config_of("two_level", candidate_pages=1000)
    both = errors(config, cache, q, backend)
    assert torch.equal(both, errors(config_of("rotated_sketch"), cache, q, backend))


def test_two_level_reads_one_level_where_every_page_is_a_candidate(backend) -> None:
    cache, q = spiky(9)
    batch = batch_of(cache)._replace(active=torch.tensor([1, 0, 1], dtype=torch.uint8))
    pages = batch.page_table.shape[1]
    single = filled(config_of("rotated_sketch"), cache, backend)
    for most, levels in ((pages, 1), (pages - 1, 2)):
        scorer = filled(config_of("two_level", candidate_pages=most), cache, backend)
        assert isinstance(scorer, TwoLevelScorer)
        if levels == 1:
            scorer.first.affine.fill_(torch.nan)
        got = scorer.score(0, q, batch, SCALE)
        read = scorer.read_bytes(0)
        assert read is not None and read.dtype == torch.float32
        if levels == 1:
            want = single.score(0, q, batch, SCALE)
            assert torch.equal(got[0, :, :pages], want[0, :, :pages])
            counts = torch.tensor([-(-LENGTHS[0] // PAGE), 0, 1])
            expected = counts[:, None].expand(3, KV_HEADS) * float(single.bytes_per_page)
            assert torch.equal(read, expected)
        else:
            assert (read[0] > pages * scorer.first.bytes_per_page).all()


def test_two_level_reads_the_second_level_of_candidates_only(backend) -> None:
    cache, q = spiky(10)
    batch = batch_of(cache)
    scorer = filled(config_of("two_level", candidate_pages=5), cache, backend)
    got = scorer.score(0, q, batch, SCALE)
    first = filled(config_of("rotated_sketch", sketch_bits=1), cache, backend)
    second = filled(config_of("rotated_sketch", sketch_bits=2), cache, backend)
    coarse, fine = (s.score(0, q, batch, SCALE) for s in (first, second))
    candidates = candidate_pages(
        coarse,
        batch.seq_lens,
        batch.active,
        num_kv_heads=KV_HEADS,
        page_size=PAGE,
        count=5,
        backend=backend,
    ).flags
    count = -(-LENGTHS[0] // PAGE)
    chosen = candidates[0, :, :count].bool().repeat_interleave(GROUP, 0)
    want = torch.where(chosen, fine[0, :, :count], coarse[0, :, :count])
    assert torch.equal(got[0, :, :count], want)
    read = scorer.read_bytes(0)
    assert read is not None and read.dtype == torch.float32
    pages = torch.tensor([-(-n // PAGE) for n in LENGTHS])
    expected = pages[:, None] * first.bytes_per_page + candidates.sum(-1) * second.bytes_per_page
    assert torch.equal(read, expected.float())
    assert (candidates.sum(-1) <= 5).all() and (candidates[0].sum(-1) > 0).all()


def test_two_levels_of_one_bit_are_refused() -> None:
    with pytest.raises(ConfigError, match="set sketch_bits to 2 or 4"):
        PSAConfig(scorer="two_level", sketch_bits=1)


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize("keys", CACHES)
def test_summaries_of_8_bits_estimate_as_those_of_16(backend, name, keys) -> None:
    cache, q = CACHES[keys](14)
    eight, sixteen = (errors(config_of(name, summary_bits=b), cache, q, backend) for b in (8, 16))
    difference = (eight - sixteen).abs()
    assert 0 < difference.max() < 0.25 and difference.mean() < 0.05


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (name, bits)
        for name in SCORERS
        for bits in ((8, 16) if name in SUMMARIES else (1, 2, 4))
        if (name, bits) != ("two_level", 1)
    ],
)
def test_bytes_stated_are_bytes_stored(name, bits) -> None:
    shape = CacheShape(3, 7, PAGE, KV_HEADS, 128, torch.device("cpu"))
    field = "summary_bits" if name in SUMMARIES else "sketch_bits"
    scorer = make_scorer(config_of(name, **{field: bits}), shape, "reference")
    stored = sum(t.numel() * t.element_size() for t in scorer.state_tensors())
    stated = SCORERS[name].page_bytes(PAGE, 128, bits)
    assert stored == stated * 3 * 7 * KV_HEADS
    assert scorer.bytes_per_page == stated
    assert scorer.size_bytes() == stored + 3 * 7 * 4


def test_bytes_of_a_page_of_16_keys_of_128() -> None:
    """Against 8192 bytes of keys and values in bfloat16."""
    found = {(n, b): SCORERS[n].page_bytes(16, 128, b) for n in SCORERS for b in (1, 2, 4, 8, 16)}
    vectors = {"mean": 1, "box": 2, "gaussian": 2, "cuboid_mean": 2, "hybrid": 4, "exact": 0}
    for name, count in vectors.items():
        assert (found[name, 16], found[name, 8]) == (count * 256, count * (128 + 4))
    for bits in (1, 2, 4):
        assert found["sketch", bits] == 16 * (16 * bits + 4)
        assert found["rotated_sketch", bits] == 16 * (16 * bits + 2)
        assert found["two_level", bits] == 16 * (16 * bits + 2 + 18)


@pytest.mark.parametrize(("name", "bits"), [(n, 16) for n in SCORERS] + [(n, 8) for n in SUMMARIES])
def test_stale_pages_are_infinite_until_they_are_rewritten(backend, name, bits) -> None:
    cache, q = plain(12)
    batch = batch_of(cache)
    scorer = filled(config_of(name, summary_bits=bits), cache, backend)
    before = scorer.score(0, q, batch, SCALE)[0, :, :41]
    assert torch.isfinite(before).all()
    slots = cache.tokens(0)
    scorer.invalidate_slots(slots[7 * PAGE + 3 : 9 * PAGE])
    stale = torch.isposinf(scorer.score(0, q, batch, SCALE)[0, :, :41])
    assert stale.all(0).tolist() == stale.any(0).tolist() == [p in (7, 8) for p in range(41)]
    scorer.on_write(0, slots[7 * PAGE : 9 * PAGE], cache.k)
    assert torch.equal(scorer.score(0, q, batch, SCALE)[0, :, :41], before)
    scorer.invalidate_all()
    assert torch.isposinf(scorer.score(0, q, batch, SCALE)[0, :, :41]).all()


@pytest.mark.parametrize("name", SCORERS)
def test_new_keys_alone_are_enough_for_low_bit_scorers(backend, name) -> None:
    """In three writes of different sizes, the last a decode step's."""
    cache, _ = plain(6)
    config = config_of(name, policy="oracle_top_p" if name == "exact" else "psa")
    shape = CacheShape(1, cache.num_pages, PAGE, *cache.k.shape[1:], torch.device("cpu"))
    from_cache, from_rows = (make_scorer(config, shape, backend) for _ in range(2))
    slots = cache.tokens(0)
    parts = [slots[: 3 * PAGE], slots[3 * PAGE : -1], slots[-1:]]
    if "sketch" not in name and name != "two_level":
        with pytest.raises(ValueError, match="use sketch, rotated_sketch or two_level"):
            from_rows.on_rows(0, slots, cache.k[slots])
        return
    for part in parts:
        from_cache.on_write(0, part, cache.k)
        from_rows.on_rows(0, part, cache.k[part])
    assert from_cache.watermark.sum() == len(slots)
    assert torch.equal(from_cache.watermark, from_rows.watermark)
    for a, b in zip(from_cache.state_tensors(), from_rows.state_tensors(), strict=True):
        assert torch.equal(a, b)


def test_exact_without_keys_says_so() -> None:
    cache, q = plain(13)
    shape = CacheShape(1, cache.num_pages, PAGE, KV_HEADS, DIM, torch.device("cpu"))
    scorer = make_scorer(config_of("exact"), shape, "reference")
    with pytest.raises(RuntimeError, match="no keys of layer 0"):
        scorer.score(0, q, batch_of(cache), SCALE)


POOL = 5  # pages
# (page, tokens, evict first): appends a chunk behind a page's fill, or starts the page anew.
WRITES = st.lists(
    st.tuples(st.integers(0, POOL - 1), st.integers(1, PAGE), st.booleans()),
    min_size=1,
    max_size=10,
)


@pytest.mark.parametrize(("name", "bits"), [(n, 16) for n in SCORERS] + [(n, 8) for n in SUMMARIES])
@settings(max_examples=15, deadline=None)
@given(writes=WRITES, seed=st.integers(0, 2**31))
def test_history_does_not_matter(name: str, bits: int, writes, seed: int) -> None:
    """Append, chunk, evict, re-use: scores and state equal those of a fresh scorer."""
    rng = torch.Generator().manual_seed(seed)
    shape = CacheShape(1, POOL, PAGE, KV_HEADS, DIM, torch.device("cpu"))
    config = config_of(name, candidate_pages=2, summary_bits=bits)
    scorer = make_scorer(config, shape, "torch")
    k = torch.full((POOL * PAGE, KV_HEADS, DIM), float("nan"), dtype=torch.bfloat16)
    fill = [0] * POOL
    for page, tokens, evict in writes:
        if evict:
            scorer.invalidate_slots(torch.tensor([page * PAGE]))
        begin = 0 if evict or fill[page] == PAGE else fill[page]
        end = min(PAGE, begin + tokens)
        slots = torch.arange(page * PAGE + begin, page * PAGE + end)
        k[slots] = torch.randn(len(slots), KV_HEADS, DIM, generator=rng).bfloat16()
        scorer.on_write(0, slots, k)
        fill[page] = end
    used = [page for page in range(POOL) if fill[page]]
    fresh = make_scorer(config, shape, "torch")
    for page in used:
        fresh.on_write(0, torch.arange(fill[page]) + page * PAGE, k)
    assert torch.equal(scorer.watermark[0, used], fresh.watermark[0, used])
    # One row a page, so that each page is a last page of its fill.
    table = torch.tensor(used, dtype=torch.int32)[:, None]
    lens = torch.tensor([fill[page] for page in used], dtype=torch.int32)
    batch = PageBatch(table, lens, torch.ones(len(used), dtype=torch.uint8))
    q = torch.randn(len(used), KV_HEADS * GROUP, DIM, generator=rng)
    got, want = (s.score(0, q, batch, SCALE) for s in (scorer, fresh))
    assert torch.isfinite(got).all() and torch.equal(got, want)
