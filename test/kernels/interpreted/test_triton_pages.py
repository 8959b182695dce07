"""Candidate pages, tail compensation and watermarks in Triton: few of the others' tests."""

import pytest
import test_candidate_pages as candidates
import test_tail_compensation as tail
import test_watermark as watermark
import torch
from kernel_cases import FP16, FP32, Case
from sgl_psa_kernels.candidate_pages import triton_backend as choice
from sgl_psa_kernels.tail_compensation import triton_backend as compensation


@pytest.mark.parametrize("group", [1, 3])
def test_candidates_of_ragged_rows(monkeypatch, group: int) -> None:
    monkeypatch.setattr(choice, "power_of_two", lambda n, least=1: 256 if least == 16 else 4)
    candidates.test_ragged_rows_match_a_ranking_in_float64("triton", group)


def test_candidates_with_ties_and_without_estimates() -> None:
    candidates.test_candidates_have_the_largest_shares_and_stale_pages_are_none("triton")
    candidates.test_of_equal_shares_the_lower_page_is_chosen("triton")
    candidates.test_a_page_without_an_estimate_for_one_head_counts_by_the_others("triton")


@pytest.mark.parametrize(
    "case",
    [
        Case(FP32, 64, 16, 2, 3, (700, 0, 47)),
        Case(FP16, 80, 8, 1, 1, (75, 16)),
        Case(FP16, 128, 16, 1, 8, (300,)),
    ],
    ids=str,
)
def test_tail_compensation(monkeypatch, case: Case) -> None:
    monkeypatch.setattr(compensation, "CHUNK", 32)
    monkeypatch.setattr(compensation, "PAGES", 16)
    tail.test_matches_float64_reference(case, "triton")


def test_tail_compensation_at_its_limits() -> None:
    tail.test_nothing_left_or_not_active_keeps_every_bit("triton")
    tail.test_huge_and_vanishing_masses("triton")
    given = tail.arguments(tail.make_batch(Case(FP32, 16, 16, 1, 2, (64,))))
    none = {name: x[:0] if torch.is_tensor(x) else x for name, x in given.items()}
    none["value_means"] = given["value_means"]
    assert tail.compensate(**none, backend="triton").shape == (0, 2, 16)


@pytest.mark.parametrize("page", [1, 4])
def test_watermarks(page: int) -> None:
    watermark.check(page, "triton", calls=25)
