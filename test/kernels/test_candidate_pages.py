"""Candidate pages: the largest shares, ties, pages that are none, and all backends alike."""

import pytest
import torch
from sgl_psa_kernels import BACKENDS
from sgl_psa_kernels.candidate_pages import PreparedChoice, candidate_pages

PAGE = 16
INF = float("inf")


def choose(log_mass, count: int, backend: str, heads: int = 1, **replace):
    rows, _, pages = log_mass.shape
    args = {
        "seq_lens": torch.full((rows,), pages * PAGE, dtype=torch.int32),
        "active": torch.ones(rows, dtype=torch.uint8),
    } | replace
    flags, chosen = candidate_pages(
        log_mass,
        args["seq_lens"],
        args["active"],
        num_kv_heads=heads,
        page_size=PAGE,
        count=count,
        backend=backend,
    )
    assert flags.dtype == torch.uint8 and flags.shape == (rows, heads, pages)
    assert torch.equal(chosen, flags.sum(-1, dtype=torch.int32))
    return flags


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_have_the_largest_shares_and_stale_pages_are_none(backend: str) -> None:
    # Two heads of one group: the first spreads its mass, the second puts it on one page.
    log_mass = torch.tensor([[[9.0, 8.0, 8.5, INF, -9.0], [0.0, 3.0, -1.0, INF, -7.0]]])

    def chosen(count: int, **replace: torch.Tensor) -> list[int]:
        return choose(log_mass, count, backend, **replace)[0, 0].tolist()

    assert chosen(9) == chosen(4) == [1, 1, 1, 0, 1]
    assert [chosen(n) for n in (1, 2, 3)] == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    short = torch.tensor([4 * PAGE + 1 - 2 * PAGE], dtype=torch.int32)
    assert chosen(9, seq_lens=short) == [1, 1, 1, 0, 0]
    assert chosen(2, seq_lens=short * 0) == [0] * 5
    assert chosen(2, active=torch.zeros(1, dtype=torch.uint8)) == [0] * 5


def test_of_equal_shares_the_lower_page_is_chosen(backend: str) -> None:
    log_mass = torch.zeros(1, 1, 70)
    log_mass[0, 0, 50] = 1.0
    log_mass[0, 0, 3] = -1.0
    want = [0, 1, 2, *range(4, 10), 50]
    assert choose(log_mass, 10, backend)[0, 0].nonzero().flatten().tolist() == want
    assert choose(log_mass, 69, backend)[0, 0].nonzero().flatten().tolist() == [
        page for page in range(70) if page != 3
    ]


def test_a_page_without_an_estimate_for_one_head_counts_by_the_others(backend: str) -> None:
    log_mass = torch.tensor([[[1.0, INF, float("nan"), 2.0], [INF, 5.0, INF, 1.0]]])
    assert choose(log_mass, 2, backend).tolist() == [[[0, 1, 0, 1]]]
    assert choose(log_mass, 3, backend).tolist() == [[[1, 1, 0, 1]]]
    nothing = torch.full((1, 2, 4), -INF)
    assert choose(nothing, 3, backend).tolist() == [[[1, 1, 1, 0]]]
    assert choose(nothing.abs(), 3, backend).tolist() == [[[0, 0, 0, 0]]]


@pytest.mark.parametrize("group", [1, 3, 8])
def test_ragged_rows_match_a_ranking_in_float64(backend: str, group: int) -> None:
    rng = torch.Generator().manual_seed(group)
    lengths, heads, pages = (0, 5, 16 * PAGE, 700 * PAGE - 3, 40 * PAGE), 2, 701
    log_mass = 5 * torch.randn(len(lengths), heads * group, pages, generator=rng)
    log_mass[torch.rand(log_mass.shape, generator=rng) < 0.05] = INF
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    flags = choose(log_mass, 40, backend, heads, seq_lens=seq_lens)
    for row, length in enumerate(lengths):
        count = -(-length // PAGE)
        assert not flags[row, :, count:].any()
        for head in range(heads if count else 0):
            x = log_mass[row, head * group : (head + 1) * group, :count].double()
            x = x.masked_fill(x == INF, -INF)
            share = (x - x.logsumexp(-1, keepdim=True)).nan_to_num(nan=-INF, neginf=-INF).amax(0)
            chosen = flags[row, head, :count].bool()
            assert chosen.sum() == min(40, int((share > -INF).sum()))
            assert (share[chosen] > -INF).all()
            if not chosen.all():
                # Shares are float32: an error of a few units in the last place of 32.
                assert share[chosen].min() > share[~chosen].max() - 2e-5


def test_bad_arguments_are_refused() -> None:
    log_mass = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="no multiple of 2 KV heads"):
        choose(log_mass, 2, "reference", heads=2)
    with pytest.raises(ValueError, match="count must be at least 1"):
        choose(log_mass, 0, "reference")
    with pytest.raises(ValueError, match="log_mass must be"):
        choose(log_mass.double(), 1, "reference")
    long = torch.tensor([5 * PAGE], dtype=torch.int32)
    for backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"seq_lens\[0\]"):
            choose(log_mass, 1, backend, seq_lens=long)


def test_a_prepared_call_takes_the_threads_of_the_moment() -> None:
    log_mass = torch.randn(1, 2, 8)
    choice = PreparedChoice(
        log_mass.shape,
        torch.tensor([8 * PAGE], dtype=torch.int32),
        torch.ones(1, dtype=torch.uint8),
        num_kv_heads=2,
        page_size=PAGE,
        count=3,
    )
    chosen = torch.zeros(1, 1, 2, dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            choice(log_mass, chosen, 0)
            assert choice._call.args.num_threads == threads
    finally:
        torch.set_num_threads(before)
    assert chosen.tolist() == [[[3, 3]]]
