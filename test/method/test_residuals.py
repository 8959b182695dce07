"""Residual statistics of requests: what they correct, how they fade, who starts anew."""

import pytest
import torch

from sgl_psa.residuals import COUNT, DECAY, ResidualState

LAYERS, HEADS = 3, 4
ALL = torch.tensor([True, True])


def sums_of(values: torch.Tensor) -> torch.Tensor:
    """Sums [L, B, Hq, 3] of residuals [L, B, Hq, n]."""
    count = torch.full(values.shape[:-1], float(values.shape[-1]))
    return torch.stack([count, values.sum(-1), values.square().sum(-1)], -1)


def residuals(rows: int, pages: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, rows, HEADS, pages, generator=rng) - 1.5


def learnt(slots: list[int], seed: int = 0) -> ResidualState:
    state = ResidualState(LAYERS)
    state.reserve(4, HEADS)
    index = torch.tensor(slots)
    state.update(index, sums_of(residuals(len(slots), 6, seed)), torch.ones(len(slots)).bool())
    return state


def test_the_correction_is_mean_and_deviations_of_one_step() -> None:
    state = learnt([2, 0])
    values, std = residuals(2, 6, 0), torch.tensor([1.0, 3.0])
    got = state.corrections(torch.tensor([2, 0]), std, ALL)
    want = values.mean(-1) + std[:, None] * values.std(-1, correction=0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want < 0).any() and (want > 0).any()


def test_older_steps_weigh_less() -> None:
    state, slots, valid = ResidualState(LAYERS), torch.tensor([1]), torch.tensor([True])
    state.reserve(2, HEADS)
    steps = [residuals(1, n, seed) for seed, n in enumerate((5, 2, 9, 4))]
    for values in steps:
        state.update(slots, sums_of(values), valid)
    weight = torch.cat(
        [torch.full((v.shape[-1],), DECAY ** (len(steps) - 1 - i)) for i, v in enumerate(steps)]
    )
    x = torch.cat(steps, -1)
    mean = (weight * x).sum(-1) / weight.sum()
    spread = ((weight * x.square()).sum(-1) / weight.sum() - mean.square()).sqrt()
    got = state.corrections(slots, torch.tensor([2.0]), valid)
    torch.testing.assert_close(got, mean + 2 * spread, rtol=1e-4, atol=1e-4)


def test_steps_and_heads_without_residuals_change_nothing() -> None:
    state = learnt([0, 1])
    before = state.sums.clone()
    sums = torch.zeros(LAYERS, 2, HEADS, 3)
    sums[1, 0, 2] = torch.tensor([2.0, 1.0, 1.0])
    for _ in range(500):
        state.update(torch.tensor([0, 1]), torch.zeros_like(sums), ALL)
    state.update(torch.tensor([0, 1]), sums, ALL)
    changed = (state.sums != before).any(-1).nonzero().tolist()
    assert changed == [[0, 1, 2]]
    torch.testing.assert_close(state.sums[0, 1, 2], DECAY * before[0, 1, 2] + sums[1, 0, 2])
    state.update(torch.tensor([0, 1]), sums, ~ALL)
    assert (state.sums != before).any(-1).nonzero().tolist() == changed


def test_nothing_known_corrects_nothing() -> None:
    state, slots = learnt([1]), torch.tensor([1, 3])
    assert state.known(slots).tolist() == [True, False]
    assert (state.corrections(slots, torch.ones(2), ALL)[:, 1] == 0).all()
    assert (state.corrections(slots, torch.ones(2), ~ALL) == 0).all()
    assert ResidualState(LAYERS).known(slots).tolist() == [False, False]


def test_fresh_requests_start_anew_and_the_others_do_not() -> None:
    state = learnt([0, 1])
    kept = state.sums[1].clone()
    state.start(8, torch.tensor([0, 1, 7]), torch.tensor([True, False, True]))
    assert (state.sums[0] == 0).all() and torch.equal(state.sums[1], kept)
    assert len(state.sums) == 8


def test_snapshots_are_handed_down() -> None:
    state = learnt([0, 1])
    snapshot = state.snapshot(1)
    state.update(torch.tensor([1]), sums_of(residuals(1, 3, 9)), torch.tensor([True]))
    assert not torch.equal(state.sums[1], snapshot)
    state.inherit(3, snapshot)
    state.inherit(6, snapshot)
    assert torch.equal(state.sums[3], snapshot) and torch.equal(state.sums[6], snapshot)
    state.inherit(0, None)
    assert (state.sums[0] == 0).all()
    other = ResidualState(LAYERS)
    assert other.snapshot(1) is None
    other.inherit(1, None)
    assert other.sums is None
    other.inherit(2, snapshot)
    assert torch.equal(other.sums[2], snapshot) and not other.sums[:2].any()


@pytest.mark.parametrize("bias", [0.0, 15.0])
def test_long_runs_keep_their_precision(bias: float) -> None:
    """Estimates far off with little spread: the variance is a small difference of large sums."""
    state, slots, valid = ResidualState(LAYERS), torch.tensor([0]), torch.tensor([True])
    state.reserve(1, HEADS)
    rng = torch.Generator().manual_seed(4)
    for _ in range(200):
        values = bias + 0.3 * torch.randn(LAYERS, 1, HEADS, 100, generator=rng)
        state.update(slots, sums_of(values), valid)
    got = state.corrections(slots, torch.tensor([1.0]), valid)
    torch.testing.assert_close(got, torch.full_like(got, bias + 0.3), rtol=0, atol=0.05)
    assert (state.sums[..., COUNT] < 1001).all()
