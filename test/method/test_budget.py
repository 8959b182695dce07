"""Online quantiles of page counts: where they settle, what they start from, what they refuse."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_psa.budget import BudgetPrior, BudgetState, PriorError, log_quantile
from sgl_psa.calibrate import one_round, parse
from sgl_psa.config import PSAConfig
from sgl_psa.prediction import prior_settings

LAYERS, HEADS = 3, 2


def prior(lengths: list[int]) -> BudgetPrior:
    """n* = a tenth of the context, times the layer's number + 1, times the head's."""
    factor = torch.arange(1.0, LAYERS + 1)[:, None] * torch.arange(1.0, HEADS + 1)
    pages = torch.tensor(lengths)
    return BudgetPrior(pages, (0.1 * pages[:, None, None] * factor).log(), {"model": "m"})


def begin(state: BudgetState, slots: list[int], pages: list[int], base: BudgetPrior) -> None:
    """New requests in ``slots``."""
    index = torch.tensor(slots)
    state.start(index, state.generation[index] + 1, torch.tensor(pages), base)


def test_the_share_of_misses_settles_at_one_minus_rho() -> None:
    rng = torch.Generator().manual_seed(0)
    rho, steps = 0.9, 6000
    state = BudgetState(1, LAYERS, HEADS, rho=rho, eta=0.05)
    slots, pages, valid = torch.tensor([0]), torch.tensor([10**6]), torch.tensor([True])
    misses = torch.zeros(LAYERS, 1, HEADS)
    spread = torch.tensor([0.2, 1.0])
    for step in range(steps):
        needed = (3 + spread * torch.randn(LAYERS, 1, HEADS, generator=rng)).exp().ceil()
        short = needed > state.predict(slots, pages)
        if step >= steps // 3:
            misses += short
        state.update(slots, short, valid)
    share = misses / (steps - steps // 3)
    assert share.flatten().tolist() == pytest.approx([1 - rho] * LAYERS * HEADS, abs=0.02)
    wanted = (3 + spread * 1.2816).expand(LAYERS, -1)  # the normal's 0.9-quantile
    torch.testing.assert_close(state.log_needed[0], wanted, rtol=0, atol=0.35)


@given(
    needed=st.lists(st.integers(1, 200), min_size=20, max_size=200),
    rho=st.floats(0.5, 0.99),
    eta=st.floats(0.02, 0.5),
    least=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_misses_are_bounded_for_any_sequence(needed, rho, eta, least) -> None:
    """The state moves by eta times (misses - (1 - rho) steps) and stays in a known range."""
    state = BudgetState(1, 1, 1, rho=rho, eta=eta, least=least)
    slots, pages, valid = torch.tensor([0]), torch.tensor([10**6]), torch.tensor([True])
    misses, floor = 0, False
    for n in needed:
        short = n > state.predict(slots, pages)
        misses += int(short)
        state.update(slots, short, valid)
        floor |= float(state.log_needed) <= math.log(least) + 1e-6
    steps = len(needed)
    room = (max(math.log(max(needed)) - math.log(least), 0) + eta) / eta + 1e-3 * steps
    assert misses <= (1 - rho) * steps + room
    if not floor:  # nothing was held back, so predictions are not too high either
        assert misses >= (1 - rho) * steps - 1e-3 * steps


def test_a_jump_is_followed_within_a_few_steps() -> None:
    state = BudgetState(1, 1, 1, rho=0.97, eta=0.2)
    slots, pages, valid = torch.tensor([0]), torch.tensor([512]), torch.tensor([True])
    counts = []
    for _ in range(30):
        state.update(slots, state.predict(slots, pages) < 100, valid)
        counts.append(int(state.predict(slots, pages)))
    assert counts[5] < 10 and 100 <= counts[-1] <= 130


def test_only_valid_rows_and_their_slots_learn() -> None:
    state = BudgetState(4, LAYERS, HEADS)
    before = state.log_needed.clone()
    short = torch.zeros(LAYERS, 2, HEADS, dtype=torch.bool)
    short[1] = True
    state.update(torch.tensor([2, 0]), short, torch.tensor([True, False]))
    changed = (state.log_needed != before).nonzero().tolist()
    assert changed == [[2, 1, 0], [2, 1, 1]]


def test_predictions_stay_within_the_context_and_above_the_least() -> None:
    state = BudgetState(2, 1, HEADS, least=3)
    state.log_needed[0] = 10.0
    got = state.predict(torch.tensor([0, 1]), torch.tensor([7, 7]))
    assert got.tolist() == [[[7, 7], [3, 3]]] and got.dtype == torch.int32
    for _ in range(50):
        state.update(torch.tensor([1]), torch.zeros(1, 1, HEADS).bool(), torch.tensor([True]))
    assert state.predict(torch.tensor([1]), torch.tensor([7])).tolist() == [[[3, 3]]]


def test_a_slot_starts_anew_with_its_next_request_only() -> None:
    state = BudgetState(0, LAYERS, HEADS, least=2)
    state.reserve(2)
    slots, pages = torch.tensor([1]), torch.tensor([100])
    state.start(slots, torch.tensor([0]), pages)
    state.update(slots, torch.ones(LAYERS, 1, HEADS).bool(), torch.tensor([True]))
    learnt = state.snapshot(1)
    state.start(slots, torch.tensor([0]), pages, prior([64]))
    state.reserve(5)
    assert torch.equal(state.log_needed[1], learnt)
    state.start(slots, torch.tensor([1]), pages)
    assert (state.log_needed == math.log(2)).all()


def test_requests_start_from_the_prior_of_their_length() -> None:
    state = BudgetState(3, LAYERS, HEADS)
    begin(state, [2, 0], [128, 4096], prior([64, 256, 512]))
    want = torch.tensor([[12.8, 25.6], [25.6, 51.2], [38.4, 76.8]])
    torch.testing.assert_close(state.log_needed[2].exp(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(state.log_needed[0].exp(), 4 * want, rtol=1e-4, atol=0)
    assert (state.log_needed[1] == 0).all()
    one = prior([64]).at(torch.tensor([1, 64, 10**6]))
    torch.testing.assert_close(one.exp(), (want / 2).expand(3, -1, -1), rtol=1e-4, atol=0)


def test_a_shared_prefix_hands_its_state_down() -> None:
    state = BudgetState(1, LAYERS, HEADS)
    begin(state, [0], [100], prior([64, 256]))
    node = state.snapshot(0)
    state.update(torch.tensor([0]), torch.ones(LAYERS, 1, HEADS).bool(), torch.tensor([True]))
    assert not torch.equal(state.log_needed[0], node)
    state.inherit(1, 7, node)
    state.start(torch.tensor([1]), torch.tensor([7]), torch.tensor([100]))
    assert torch.equal(state.log_needed[1], node)
    state.start(torch.tensor([1]), torch.tensor([8]), torch.tensor([100]))
    assert (state.log_needed[1] == 0).all()


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
    damaged = [
        ({"format": 0}, "format"),
        ({"format": 1, "pages": [1]}, "damaged"),
        ({"format": 1, "pages": [1], "log_needed": [], "about": {}}, "damaged"),
        ({"format": 1, "pages": ["x"], "log_needed": [[[0.0]]], "about": {}}, "damaged"),
    ]
    for document, message in damaged:
        path.write_text(json.dumps(document))
        with pytest.raises(PriorError, match=message):
            BudgetPrior.load(path, LAYERS, HEADS)


def test_a_rank_takes_its_heads_of_the_prior() -> None:
    whole = prior([64, 256])
    part = whole.heads(1, 1)
    assert torch.equal(part.log_needed, whole.log_needed[..., 1:]) and part.about == whole.about


def test_a_prior_knows_what_it_was_measured_with() -> None:
    config = PSAConfig(delta=0.2)
    base = replace(prior([64]), about={"model": "m", **prior_settings(config, 16)})
    assert base.differences(**prior_settings(config, 16)) == []
    other = base.differences(**prior_settings(PSAConfig(scorer="mean"), 32))
    assert [text.split()[0] for text in other] == ["knob", "scorer", "page_size"]
    assert other[0] == f"knob 0.2 instead of {PSAConfig().delta}"


def test_bad_rates_are_refused() -> None:
    for options in ({"rho": 1.0}, {"rho": 0.0}, {"eta": 0.0}, {"least": 0}):
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


def test_the_calibration_takes_the_settings_of_the_server(capsys) -> None:
    given = '{"scorer": "mean", "group_pages": 8, "predict": true, "budget_prior": "old.json"}'
    config = parse(["--psa-config", given, "--delta", "0.05", "--rho", "0.9"]).config
    assert (config.scorer, config.group_pages, config.delta) == ("mean", 8, 0.05)
    assert config.predict_rho == 0.9 and config.min_context == 0 and not config.predict
    with pytest.raises(SystemExit):
        parse(["--stop", "never"])
    assert "stop='never': expected one of" in capsys.readouterr().err
