"""Online quantiles of page counts: where they settle, what they start from, what they refuse."""

import json
import math
from pathlib import Path

import pytest
import torch

from sgl_psa.budget import BudgetPrior, BudgetState, PriorError, log_quantile
from sgl_psa.calibrate import one_round

LAYERS, HEADS = 3, 2


def prior(lengths: list[int]) -> BudgetPrior:
    """n* = a tenth of the context, times the layer's number + 1, times the head's."""
    factor = torch.arange(1.0, LAYERS + 1)[:, None] * torch.arange(1.0, HEADS + 1)
    pages = torch.tensor(lengths)
    return BudgetPrior(pages, (0.1 * pages[:, None, None] * factor).log(), {"model": "m"})


def test_the_share_of_misses_settles_at_one_minus_rho() -> None:
    rng = torch.Generator().manual_seed(0)
    rho, steps = 0.9, 6000
    state = BudgetState(1, LAYERS, HEADS, rho=rho, eta=0.05)
    slots, pages, valid = torch.tensor([0]), torch.tensor([10**6]), torch.tensor([True])
    misses = torch.zeros(HEADS)
    for step in range(steps):
        spread = torch.tensor([0.2, 1.0])
        needed = (3 + spread * torch.randn(1, HEADS, generator=rng)).exp().ceil()
        if step >= steps // 3:
            misses += (needed > state.predict(slots, 1, pages))[0]
        state.update(slots, 1, needed, valid)
    assert (misses / (steps - steps // 3)).tolist() == pytest.approx([1 - rho] * 2, abs=0.02)
    wanted = 3 + torch.tensor([0.2, 1.0]) * 1.2816  # the normal's 0.9-quantile
    torch.testing.assert_close(state.log_needed[0, 1], wanted, rtol=0, atol=0.35)
    assert (state.log_needed[0, [0, 2]] == 0).all()


def test_a_jump_is_followed_within_a_few_steps() -> None:
    state = BudgetState(1, 1, 1, rho=0.97, eta=0.2)
    slots, pages, valid = torch.tensor([0]), torch.tensor([512]), torch.tensor([True])
    counts = []
    for _ in range(30):
        state.update(slots, 0, torch.tensor([[100]]), valid)
        counts.append(int(state.predict(slots, 0, pages)))
    assert counts[5] < 10 and 100 <= counts[-1] <= 130


def test_only_valid_rows_and_their_slots_learn() -> None:
    state = BudgetState(4, LAYERS, HEADS)
    before = state.log_needed.clone()
    needed = torch.full((2, HEADS), 50)
    state.update(torch.tensor([2, 0]), 1, needed, torch.tensor([True, False]))
    changed = (state.log_needed != before).nonzero().tolist()
    assert changed == [[2, 1, 0], [2, 1, 1]]


def test_predictions_stay_within_the_context() -> None:
    state = BudgetState(2, 1, HEADS)
    state.log_needed[0] = 10.0
    got = state.predict(torch.tensor([0, 1]), 0, torch.tensor([7, 7]))
    assert got.tolist() == [[7, 7], [1, 1]]


def test_requests_start_from_the_prior_of_their_length() -> None:
    state = BudgetState(3, LAYERS, HEADS)
    state.start(torch.tensor([2, 0]), torch.tensor([128, 4096]), prior([64, 256, 512]))
    want = torch.tensor([[12.8, 25.6], [25.6, 51.2], [38.4, 76.8]])
    torch.testing.assert_close(state.log_needed[2].exp(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(state.log_needed[0].exp(), 4 * want, rtol=1e-4, atol=0)
    assert (state.log_needed[1] == 0).all()
    one = prior([64]).at(torch.tensor([1, 64, 10**6]))
    torch.testing.assert_close(one.exp(), (want / 2).expand(3, -1, -1), rtol=1e-4, atol=0)


def test_a_shared_prefix_hands_its_state_down() -> None:
    state = BudgetState(2, LAYERS, HEADS)
    state.start(torch.tensor([0]), torch.tensor([100]), prior([64, 256]))
    node = state.snapshot(0)
    state.update(torch.tensor([0]), 0, torch.full((1, HEADS), 10**6), torch.tensor([True]))
    state.inherit(1, node)
    assert torch.equal(state.log_needed[1], node)
    assert not torch.equal(state.log_needed[0], node)


def test_files_hold_what_was_saved_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    saved = prior([64, 256])
    saved.save(path)
    loaded = BudgetPrior.load(path, LAYERS, HEADS)
    assert torch.equal(loaded.pages, saved.pages) and loaded.about == saved.about
    torch.testing.assert_close(loaded.log_needed, saved.log_needed)
    with pytest.raises(PriorError, match="the model has"):
        BudgetPrior.load(path, LAYERS + 1, HEADS)
    with pytest.raises(PriorError, match="calibrate"):
        BudgetPrior.load(tmp_path / "none.json", LAYERS, HEADS)
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(PriorError, match="format"):
        BudgetPrior.load(path, LAYERS, HEADS)


def test_bad_rates_are_refused() -> None:
    for options in ({"rho": 1.0}, {"rho": 0.0}, {"eta": 0.0}):
        with pytest.raises(ValueError, match="rho"):
            BudgetState(1, 1, 1, **options)


def test_log_quantile_is_the_smallest_sufficient_observation() -> None:
    needed = torch.arange(1, 101)[torch.randperm(100)][:, None]
    assert float(log_quantile(needed, 0.95)) == pytest.approx(math.log(95))
    assert float(log_quantile(needed[:1] * 0, 0.5)) == 0.0


def test_one_round_says_how_the_prediction_does() -> None:
    base = prior([64]).log_needed.exp()[0]  # [L, Hkv]
    steady = base.ceil().expand(40, 2, LAYERS, HEADS).transpose(1, 2)
    found = one_round(steady.long(), 64, prior([64]), rho=0.97)
    assert found["cold"] == 1.0 and found["warm"] > 0.9
    assert 1.0 <= found["excess"] < 1.1
    jump = one_round(2 * steady.long(), 64, prior([64]), rho=0.97)
    assert jump["cold"] == 0.0 and jump["warm"] > 0.75
