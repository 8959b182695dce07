"""Rounds of progressive decode in Triton: windows, wide groups, kept residuals."""

import pytest
import torch
from kernel_cases import FP32, Case, make_batch
from sgl_psa_kernels.progressive_decode import triton_backend
from test_kept_residuals import starts, told
from test_progressive_decode import INF, RULES, decode, estimates
from test_triton_decode import check

CASE = Case(FP32, 16, 16, 1, 3, (390, 0, 290, 310, 300, 33))
MIXED = [
    RULES[name]
    for name in (
        "marginal-.02",
        "dense",
        "coverage-.95-bold",
        "coverage-all",
        "conservative-.8",
        "coverage-.8",
    )
]


@pytest.mark.parametrize(
    ("tokens", "rounds", "group", "percent", "predicted", "known"),
    [
        (10**9, 0, 2, 0, False, True),
        (1, 3, 2, 0, True, True),
        (1, 2, 100, 0, False, False),
        (96, 1, 1, 60, False, True),
        (96, 6, 2, 100, True, True),
        (48, 2, 3, 150, False, False),
        (10**9, 0, 1, 35, True, False),
    ],
)
def test_rounds_match_float64_reference(
    monkeypatch, tokens: int, rounds: int, group: int, percent: int, predicted: bool, known: bool
) -> None:
    """Several windows a row; groups that grow and that do not; rounds that one program attends,
    before and behind those that are split over programs."""
    monkeypatch.setattr(triton_backend, "WINDOW", 16)
    monkeypatch.setattr(triton_backend, "STEP", 8)
    monkeypatch.setattr(triton_backend, "WIDE_TOKENS", tokens)
    monkeypatch.setattr(triton_backend, "WIDE_ROUNDS", rounds)
    monkeypatch.setattr(triton_backend, "EQUAL_ROUNDS", rounds)
    batch = make_batch(CASE)
    log_mass = estimates(batch)
    log_mass[3, :, 7] = -INF
    log_mass[0, :, 10:14] = log_mass[0, :, 9:10]
    options: dict = {"group_pages": group, "group_percent": percent}
    if predicted:
        options["first_pages"] = torch.tensor([[9], [5], [24], [-(2**31)], [10**6], [3]]).int()
    if known:
        options["kappa_start"] = starts(CASE)
    shape = (len(CASE.lens), 1, batch.page_table.shape[1])
    results, sums, read = {}, {}, {}
    for name in ("reference", "triton"):
        if known:
            options["residuals"] = sums[name] = told(CASE)
        options["attended"] = read[name] = torch.full(shape, 7).byte()
        results[name] = decode(batch, log_mass, MIXED, name, exact=name == "reference", **options)
    check(batch, results["triton"], results["reference"])
    assert torch.equal(read["triton"], read["reference"])
    assert results["triton"][2][3, 0, 0] >= 19
    if known:
        assert torch.equal(sums["triton"][..., 0], sums["reference"][..., 0])
        torch.testing.assert_close(sums["triton"], sums["reference"], rtol=1e-4, atol=1e-4)
        assert (sums["triton"][2:5, :, 0] > 3).all() and (sums["triton"][:2] == 0).all()


def test_residuals_of_a_dense_batch_are_none() -> None:
    batch = make_batch(Case(FP32, 16, 16, 1, 2, (40,)))
    sums = told(batch.case)
    decode(batch, None, RULES["dense"], "triton", residuals=sums)
    assert (sums == 0).all()


def test_what_small_groups_say_of_the_estimates_holds_for_the_wide_ones(monkeypatch) -> None:
    """Groups of 2, 4, 8, 16 pages, wide from 8 on; which rows have one follows from the others."""
    monkeypatch.setattr(triton_backend, "WIDE_TOKENS", 128)
    batch = make_batch(Case(FP32, 16, 16, 1, 2, (390, 400, 410, 300, 310, 320)))
    options = {"group_pages": 1, "group_percent": 90, "sink_pages": 0, "recent_pages": 1}
    rules = [(2, threshold, -INF, 1.0) for threshold in (2.0, 1.5, 1.0, 0.5, 0.0, -0.5)]
    for seed in range(3):
        log_mass = estimates(batch, seed, noise=1.5)
        want = decode(batch, log_mass, rules, "reference", exact=True, **options)
        check(batch, decode(batch, log_mass, rules, "triton", **options), want)
        assert want[2][..., 0].min() <= 9 < want[2][..., 0].max()
