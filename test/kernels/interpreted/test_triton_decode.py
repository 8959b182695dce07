"""Progressive decode in Triton against a float64 run of the reference."""

import pytest
import torch
from kernel_cases import BF16, FP16, FP32, Batch, Case, assert_rounded, make_batch
from sgl_psa_kernels.progressive_decode import STAT_NAMES, triton_backend
from test_progressive_decode import INF, RULES, decode, estimates
from torch.utils._python_dispatch import TorchDispatchMode

#: One rule a row.
MIXED = [RULES[name] for name in RULES]


def check(batch: Batch, got, want) -> None:
    """got: what is tested; want: the reference in float64."""
    out, lse, stats = got
    dtype = batch.case.dtype
    live = torch.tensor(batch.case.lens) > 0
    coverage = STAT_NAMES.index("estimated_coverage")
    assert torch.equal(
        stats.index_fill(-1, torch.tensor(coverage), 0.0),
        want[2].index_fill(-1, torch.tensor(coverage), 0.0),
    )
    torch.testing.assert_close(stats, want[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[live].double(), want[1][live], rtol=4e-6, atol=4e-6)
    assert (lse[~live] == -INF).all() and (out[~live] == 0).all()
    # Weights are rounded to the type of the values; the interpreter truncates bfloat16.
    unit = 0.0 if dtype == FP32 else torch.finfo(dtype).eps
    noise = 2e-5 + unit * float(batch.v.nan_to_num(0.0).abs().max())
    assert_rounded(out[live], want[0][live], noise, dtype)


def compare(batch: Batch, log_mass, rules, **options) -> None:
    check(
        batch,
        decode(batch, log_mass, rules, "triton", **options),
        decode(batch, log_mass, rules, "reference", exact=True, **options),
    )


@pytest.mark.parametrize(
    ("case", "start", "predicted"),
    [
        (Case(FP32, 64, 16, 1, 3, (110, 0, 131, 100, 130, 1, 140, 99)), 0, False),
        (Case(FP32, 64, 16, 1, 3, (110, 0, 131, 100, 130, 1, 140, 99)), 0, True),
        (Case(FP16, 80, 8, 1, 1, (16, 75, 66, 9)), 1, True),
        (Case(FP32, 96, 128, 1, 2, (700, 128, 641)), 4, True),
        (Case(BF16, 256, 32, 1, 8, (310, 5, 300)), 5, False),
        (Case(FP16, 128, 64, 2, 5, (640,)), 6, True),
    ],
    ids=str,
)
def test_matches_float64_reference(case: Case, start: int, predicted: bool) -> None:
    batch = make_batch(case)
    rows = len(case.lens)
    options = {}
    if predicted:
        first = 2 + torch.arange(rows * case.num_kv_heads, dtype=torch.int32)
        options["first_pages"] = first.view(rows, -1)
    compare(batch, estimates(batch), [*MIXED, *MIXED][start : start + rows], **options)


@pytest.mark.parametrize(
    ("sinks", "recent", "group"), [(0, 0, 1), (3, 5, 4), (0, 90, 1), (1, 1, 100)]
)
def test_forced_pages_and_group_sizes(sinks: int, recent: int, group: int) -> None:
    batch = make_batch(Case(FP32, 16, 16, 1, 3, (200, 190, 210)))
    rules = [RULES[name] for name in ("marginal-.02", "coverage-.95-bold", "conservative-.8")]
    first = torch.tensor([[7], [10**6], [-(2**31)]], dtype=torch.int32)
    options = {"sink_pages": sinks, "recent_pages": recent, "group_pages": group}
    if group != 4:
        options["first_pages"] = first
    compare(batch, estimates(batch), rules, **options)


def test_a_dense_batch_needs_no_estimates() -> None:
    batch = make_batch(Case(FP32, 64, 16, 2, 2, (100, 0, 1)))
    compare(batch, None, RULES["dense"])


@pytest.mark.parametrize("predicted", [False, True])
def test_ties_go_to_the_lower_page_and_passed_over_pages_stay_unread(predicted: bool) -> None:
    batch = make_batch(Case(FP32, 64, 16, 1, 2, (320, 320)))
    log_mass = torch.full((2, 2, batch.page_table.shape[1]), 4.0)
    # Row 1: each head wants other pages, some of them none.
    log_mass[1, 0, ::3], log_mass[1, 1, ::3] = 0.0, -INF
    log_mass[1, 1, 1::3] = -3.0
    options = {"first_pages": torch.tensor([[4], [6]], dtype=torch.int32)} if predicted else {}
    rule = (1, -1.5, 0.0, 0.0)
    told = torch.full((2, 1, batch.page_table.shape[1]), 7).byte()
    want = told.clone()
    options |= {"group_pages": 2, "sink_pages": 0, "recent_pages": 1}
    got = decode(batch, log_mass, rule, "triton", attended=told, **options)
    check(
        batch,
        got,
        decode(batch, log_mass, rule, "reference", exact=True, attended=want, **options),
    )
    assert torch.equal(told, want)
    assert 1 < got[2][0, 0, 0] < 20 and 1 < got[2][1, 0, 0] < 20


def test_large_and_tiny_logits_stay_finite() -> None:
    batch = make_batch(Case(FP32, 64, 16, 1, 2, (200,) * 8), spread=60.0)
    log_mass = estimates(batch)
    out, lse, stats = decode(batch, log_mass, MIXED, "triton")
    want = decode(batch, log_mass, MIXED, "reference", exact=True)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.double(), want[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(stats[..., :4], want[2][..., :4])


def test_chunks_are_merged_and_rows_do_not_depend_on_the_batch(monkeypatch) -> None:
    """Several chunks a list and several turns a program; bit for bit the same alone."""
    monkeypatch.setattr(triton_backend, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(triton_backend, "PROGRAMS", 3)
    case = Case(FP32, 64, 16, 1, 2, (700, 20, 600, 650))
    batch = make_batch(case)
    log_mass = estimates(batch)
    rules = [RULES[name] for name in ("dense", "dense", "coverage-.8", "conservative-.5-bold")]
    first = torch.tensor([[0], [0], [30], [30]], dtype=torch.int32)
    got = decode(batch, log_mass, rules, "triton", first_pages=first)
    check(batch, got, decode(batch, log_mass, rules, "reference", exact=True, first_pages=first))
    for row in (0, 3):
        here = slice(row, row + 1)
        alone = Batch(
            Case(*[*vars(case).values()][:5], (case.lens[row],)),
            batch.q[here],
            batch.k,
            batch.v,
            batch.page_table[here],
            batch.seq_lens[here],
        )
        single = decode(alone, log_mass[here], rules[row], "triton", first_pages=first[here])
        for a, b in zip(got, single, strict=True):
            assert torch.equal(a[here], b)


class NoWordToTheHost(TorchDispatchMode):
    """Fails on operators whose result or shape the host must wait for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(wait in name for wait in self.WAITS), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    batch = make_batch(Case(FP32, 16, 16, 1, 1, (70,)))
    log_mass = estimates(batch)
    rules = [RULES["coverage-.8"]]
    first = torch.tensor([[3]], dtype=torch.int32)
    with NoWordToTheHost():
        decode(batch, log_mass, rules, "triton", first_pages=first)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWordToTheHost():
        decode(batch, log_mass, rules, "torch", first_pages=first)
