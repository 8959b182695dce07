"""Decode over a page tier against the same kernel on a resident pool: equal bit for bit."""

import dataclasses
import math

import pytest
import torch
from kernel_cases import CASES, Batch, Case, make_batch
from sgl_psa_kernels.page_tier import PageTier, TierShape, codec, make_tier
from sgl_psa_kernels.progressive_decode import progressive_decode
from test_progressive_decode import RULES, estimates
from tier_cases import host_store

LAYERS = 2
OTHER = 1
"""The layer that is decoded; the batch's pages lie in it, and other tokens in the other one."""


def tier_of(
    batch: Batch,
    fraction: float,
    host: str = "memory",
    pipeline: bool = True,
    host_dtype: torch.dtype | None = None,
) -> PageTier:
    """A tier with the batch's tokens, and frames for a fraction of its pages of both layers; with
    an int8 host, for all open pages on top, and the batch is rounded."""
    case = batch.case
    size = (case.page_size, case.num_kv_heads, case.head_dim)
    shape = TierShape(LAYERS, batch.num_pages, 1, *size, case.dtype, host_dtype)
    frames = max(math.ceil(fraction * LAYERS * batch.num_pages), shape.minimum_frames)
    if shape.int8_host:
        frames += LAYERS * open_pages(case)
    shape = shape._replace(num_frames=frames)
    tier = make_tier(shape, host_store(host, shape.host_bytes), backend="cpu", pipeline=pipeline)
    for row in range(len(case.lens)):
        slots = batch.slots(row)
        for layer in range(LAYERS):
            sign = 1 if layer == OTHER else -1
            tier.write(layer, slots, sign * batch.k[slots], sign * batch.v[slots])
        if shape.int8_host:
            full = slots[: len(slots) // case.page_size * case.page_size]
            round_pages(batch, full.view(-1, case.page_size), shape)
    return tier


def open_pages(case: Case) -> int:
    """Rows whose last page is not full."""
    return sum(length % case.page_size > 0 for length in case.lens)


def round_pages(batch: Batch, pages: torch.Tensor, shape: TierShape) -> None:
    """Have the pool say what an int8 host says of full pages, by their slots [n, page_size]."""
    for page in pages:
        record = codec.encode(batch.k[page].movedim(0, 1), batch.v[page].movedim(0, 1))
        batch.k[page], batch.v[page] = codec.decode(record, shape).movedim(1, 2)


def both(
    batch: Batch,
    tier: PageTier,
    rules,
    step: int = 1,
    with_start: bool = False,
    threads: int = 1,
    **options,
):
    """(out, lse, stats, attended, residuals) of the tier, and of the resident pool."""
    case = batch.case
    rows, heads = len(case.lens), case.num_kv_heads * case.group
    width = batch.page_table.shape[1]
    names = list(rules) * rows if len(rules) == 1 else list(rules)
    table = list(zip(*(RULES[name] for name in names[:rows]), strict=True))
    rule = [torch.tensor(table[0], dtype=torch.int32)]
    rule += [torch.tensor(column, dtype=torch.float32) for column in table[1:]]
    options = {"sink_pages": 1, "recent_pages": 2, "group_pages": 3} | options
    options["sm_scale"] = batch.sm_scale
    if with_start:
        options["kappa_start"] = torch.linspace(-0.5, 1, rows * heads).view(rows, heads)
    args = (batch.page_table, batch.seq_lens, estimates(batch), *rule)
    results = []
    for tiered in (True, False):
        attended = torch.full((rows, case.num_kv_heads, width), 7, dtype=torch.uint8)
        residuals = torch.full((rows, heads, 3), 7.0)
        kept = {"attended": attended, "residuals": residuals}
        torch.set_num_threads(threads)
        try:
            if tiered:
                stats = torch.empty(rows, case.num_kv_heads, 6)
                got = tier.decode(OTHER, step, batch.q, *args, **options, **kept, stats=stats)
                assert got[2] is stats
            else:
                got = progressive_decode(
                    batch.q,
                    batch.k,
                    batch.v,
                    *args,
                    page_size=case.page_size,
                    backend="cpu",
                    **options,
                    **kept,
                )
        finally:
            torch.set_num_threads(1)
        results.append((*got, attended, residuals))
    return results


def assert_equal(results) -> None:
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))


@pytest.mark.parametrize("fraction", [1, 0.25, 0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_resident_run(case: Case, fraction: float) -> None:
    batch = make_batch(case)
    tier = tier_of(batch, fraction)
    for step, rule in enumerate(RULES, 1):
        assert_equal(both(batch, tier, [rule], step))
        assert tier.check() == []
    tier.close()


BIG = Case(torch.bfloat16, 64, 16, 2, 4, (2100, 0, 1500, 16, 901, 700, 1037, 33))
#: Of the pages of both layers: one layer's, and the other's open ones, which are not driven out.
ONE_LAYER = 0.52


@pytest.mark.parametrize("host", ["memory", "file"])
@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("fraction", [1, ONE_LAYER, 0.25, 0.1, 0])
def test_rules_mix_whatever_the_arena(fraction: float, pipeline: bool, host: str) -> None:
    batch = make_batch(BIG)
    tier = tier_of(batch, fraction, host, pipeline)
    if fraction >= ONE_LAYER:
        tier.drain()  # a page that is being saved keeps its frame, so that others have to go
    first = torch.tensor([[40, 7], [0, 0], [500, 1], [3, 3], [9, 30], [0, 2], [1, 1], [2, 2]])
    kinds = ((3, 0, False), (1, 0, True), (40, 0, False), (1, 120, False))
    for step, (group, percent, predicted) in enumerate(kinds, 1):
        extra = {"first_pages": first.int()} if predicted else {}
        extra |= {"group_pages": group, "group_percent": percent}
        assert_equal(both(batch, tier, RULES, step, predicted, **extra))
    counters = tier.counters()
    assert tier.check() == []
    if not pipeline:
        assert counters.bytes_in_vain == 0
    if fraction >= ONE_LAYER:
        assert counters.loads <= batch.num_pages  # those that the prefill left without frame
    tier.close()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_an_arena(threads: int) -> None:
    batch = make_batch(BIG)
    for fraction, host in ((1, "memory"), (0.2, "file"), (0, "memory"), (0, "file")):
        tier = tier_of(batch, fraction, host)
        quota = min(tier.shape.minimum_frames + 1, tier.shape.num_frames)
        tier.set_quota(quota)
        for step in range(1, 4):
            results = both(batch, tier, RULES, step, threads=threads, group_pages=1 + 4 * step)
            assert_equal(results)
            assert tier.check() == []
        held = (tier.tables.frame_of >= 0).sum(1)
        assert fraction == 1 or int(held[OTHER]) <= quota
        tier.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_int8_host_keeps_open_pages_and_rounds_full_ones(dtype: torch.dtype) -> None:
    case = dataclasses.replace(BIG, dtype=dtype)
    for fraction, host, threads in ((1, "file", 1), (0.2, "memory", 5), (0, "file", 5)):
        batch = make_batch(case)
        tier = tier_of(batch, fraction, host, host_dtype=torch.int8)
        if fraction < 1:
            tier.set_quota(tier.shape.minimum_frames + open_pages(case))
        for step in range(1, 4):
            assert_equal(both(batch, tier, RULES, step, threads=threads, group_pages=1 + 4 * step))
            assert tier.check() == []
        assert fraction == 1 or tier.counters().loads > 0
        tier.close()


def test_nothing_is_loaded_when_all_is_there() -> None:
    batch = make_batch(BIG)
    tier = tier_of(batch, 1.1)
    results = both(batch, tier, RULES)
    counters = tier.counters()
    assert counters.loads == counters.bytes_in_vain == counters.stall_ns == counters.evictions == 0
    assert counters.hits == int(results[0][3].sum())
    stamped = {
        int(batch.page_table[row, place]) for row, _, place in results[0][3].nonzero().tolist()
    }
    assert set(tier.tables.stamp[OTHER].nonzero().flatten().tolist()) == stamped
    assert int(tier.tables.uses.sum()) == counters.hits
    tier.close()


def test_loads_and_hits_add_up_to_what_was_attended() -> None:
    batch = make_batch(BIG)
    tier = tier_of(batch, 0.25)
    before = tier.counters()
    total = sum(
        int(both(batch, tier, [rule], step)[0][3].sum())
        for step, rule in enumerate(("marginal-.3", "dense", "coverage-.8"), 1)
    )
    tier.drain()
    after = tier.counters()
    unused = after.bytes_in_vain // tier.shape.record_bytes
    loads = after.loads - before.loads
    # What was loaded was attended, was given up unused, or lies there still.
    assert 0 <= after.hits + loads - total - unused <= tier.shape.num_frames
    assert after.bytes_loaded == after.loads * tier.shape.record_bytes
    tier.close()


def test_at_most_a_group_a_head_is_loaded_in_vain() -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 2, (4000,)))
    tier = tier_of(batch, 0.5)
    tier.set_victims(tier.tables.frame_of[0][tier.tables.frame_of[0] >= 0][None].contiguous())
    group = 4
    attended = both(batch, tier, ["marginal-.3"], group_pages=group)[0][3]
    tier.drain()
    counters = tier.counters()
    pages = int(attended.any(1).sum())
    assert counters.loads <= pages + 2 * group
    tier.close()


def test_one_tier_decodes_other_batches_in_turn() -> None:
    """Arguments that stay between calls are those of the batch at hand."""
    batch = make_batch(BIG)
    tier = tier_of(batch, 0.5)
    for step, lens in enumerate(([2100, 0, 1500], [1400, 0, 77], [16, 0, 1500]), 1):
        batch.seq_lens = torch.tensor(lens + list(BIG.lens[3:]), dtype=torch.int32)
        for rules in (RULES, list(reversed(RULES))):
            assert_equal(both(batch, tier, rules, step))
    with pytest.raises(RuntimeError, match="holds 0 tokens"):
        batch.page_table[1, 0] = 0
        batch.seq_lens[1] = 3
        both(batch, tier, RULES, 4)
    tier.drain()
    assert tier.check() == []
    batch.seq_lens[1] = 0
    assert_equal(both(batch, tier, RULES, 5))
    with pytest.raises(ValueError, match="names a page outside of the pool"):
        batch.page_table[0, 0] = -1
        both(batch, tier, RULES, 6)
    tier.close()
