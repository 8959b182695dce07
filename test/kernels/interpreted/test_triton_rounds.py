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
    ("wide", "group", "predicted", "known"),
    [(0, 2, False, True), (3, 2, True, True), (2, 100, False, False)],
)
def test_rounds_match_float64_reference(
    monkeypatch, wide: int, group: int, predicted: bool, known: bool
) -> None:
    """Several windows a row, rounds that are split over programs and rounds that are not."""
    monkeypatch.setattr(triton_backend, "WINDOW", 16)
    monkeypatch.setattr(triton_backend, "STEP", 8)
    monkeypatch.setattr(triton_backend, "WIDE_TOKENS", 1 if wide else 10**9)
    monkeypatch.setattr(triton_backend, "WIDE_ROUNDS", wide)
    batch = make_batch(CASE)
    log_mass = estimates(batch)
    log_mass[3, :, 7] = -INF
    log_mass[0, :, 10:14] = log_mass[0, :, 9:10]
    options: dict = {"group_pages": group}
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
