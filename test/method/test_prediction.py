"""Prediction in the decode wrapper: what it may change, what it may not, whose state it is."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sgl_psa.budget import BudgetPrior, PriorError
from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.prediction import Snapshot, least_pages, prior_settings
from sgl_psa.residuals import DECAY, KEPT_STD
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.stats import ROUNDS
from sgl_psa.wrapper import PSADecodeWrapper
from test.method.cache import PAGE, Cache, dense, make_cache, make_wrapper

CONFIG = PSAConfig(min_context=0, group_pages=2, scorer="exact", predict=True)
PLAIN = dataclasses.replace(CONFIG, predict=False)
KV_HEADS, GROUP, DIM = 2, 3, 32
SCALE = DIM**-0.5


def queries(rows: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, KV_HEADS * GROUP, DIM, generator=rng)


class Steps:
    """Decode steps of requests whose slots are their rows; the rule table lives on."""

    def __init__(
        self, cache: Cache, config: PSAConfig, backend: str, prior: BudgetPrior | None = None
    ) -> None:
        self.cache = cache
        wrapper, scorer = make_wrapper(cache, config, backend)
        if prior is not None:
            wrapper = PSADecodeWrapper(
                config, scorer, backend=backend, kv_element_bytes=4, prior=prior
            )
        self.wrapper = wrapper
        self.table = RuleTable(config, len(cache.seq_lens), "cpu")

    def request(self, slot: int, **params: object) -> None:
        self.table.set(slot, RequestRule.parse(params, self.wrapper.config))

    def step(self, seed: int):
        """(out, rounds [B, Hkv], StepStats)."""
        slots = torch.arange(len(self.cache.seq_lens))
        rows = self.table.rows(slots)
        self.wrapper.plan(self.cache.req_to_token, slots, self.cache.seq_lens, rows)
        q = queries(len(slots), seed)
        out, _ = self.wrapper.run(0, q, self.cache.k, self.cache.v, SCALE)
        rounds = self.wrapper.columns(0)[..., ROUNDS].clone()
        return out, rounds, self.wrapper.finish()

    @property
    def state(self) -> torch.Tensor:
        return self.wrapper.predictor.state.log_needed


@pytest.fixture
def cache() -> Cache:
    return make_cache([60 * PAGE, 40 * PAGE + 3], KV_HEADS, DIM, seed=1)


def test_a_cold_start_without_prior_reads_as_without_prediction(backend, cache) -> None:
    plain, predicted = Steps(cache, PLAIN, backend), Steps(cache, CONFIG, backend)
    (out, rounds, step), (want, want_rounds, want_step) = predicted.step(5), plain.step(5)
    assert torch.equal(out, want) and torch.equal(rounds, want_rounds)
    assert step.row(0).pages_attended == want_step.row(0).pages_attended


def test_rounds_fall_and_the_stop_rule_still_decides(backend, cache) -> None:
    """One coverage rule; with prediction it holds at least as well, in fewer rounds."""
    config = dataclasses.replace(CONFIG, stop="coverage", coverage=0.8)
    predicted = Steps(cache, config, backend)
    plain = Steps(cache, dataclasses.replace(config, predict=False), backend)
    one_round = []
    for seed in range(25):
        out, rounds, step = predicted.step(seed)
        _, plain_rounds, plain_step = plain.step(seed)
        assert (rounds <= plain_rounds).all()
        # Groups end elsewhere, so up to a group less may turn out to be enough.
        slack = step.layer(0).visits * (config.group_pages - 1)
        assert step.layer(0).pages_attended >= plain_step.layer(0).pages_attended - slack
        for row in range(2):
            assert step.row(row).coverage / KV_HEADS > 0.79
        error = (out.double() - dense(cache, queries(2, seed), SCALE)).norm(dim=-1)
        assert error.max() <= 2 * 0.21 * cache.v[cache.tokens(0)].norm(dim=-1).max()
        one_round.append(step.layer(0).one_round)
    assert one_round[0] == 0 and min(one_round[-3:]) > 0.5
    total = predicted.wrapper.stats.total()
    assert total.one_round > plain.wrapper.stats.total().one_round == 0


@pytest.mark.parametrize("params", [{"psa_coverage": 1.0}, {"psa_policy": "dense"}])
def test_asking_for_everything_is_dense_and_teaches_nothing(backend, cache, params) -> None:
    steps = Steps(cache, CONFIG, backend)
    steps.request(0, **params)
    steps.step(0)
    before = steps.state[0].clone()
    out, _, step = steps.step(1)
    exact = dense(cache, queries(2, 1), SCALE)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=0, atol=2e-6)
    assert torch.equal(steps.state[0], before)
    assert step.row(0).stopped == 0 and step.row(0).one_round is None
    assert step.row(1).stopped == KV_HEADS


def test_policies_that_choose_their_pages_are_left_alone(backend, cache) -> None:
    params = {"psa_policy": "window", "psa_budget_pages": 20}
    steps, plain = Steps(cache, CONFIG, backend), Steps(cache, PLAIN, backend)
    for each in (steps, plain):
        each.request(0, **params)
    for seed in range(3):
        got, want = steps.step(seed), plain.step(seed)
        assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])
        assert got[2].row(0).stopped == 0
    assert (steps.state[0] == steps.wrapper.predictor.state.log_least).all()
    assert (steps.state[1] > steps.wrapper.predictor.state.log_least).any()


def test_a_new_request_in_an_old_slot_starts_anew(backend, cache) -> None:
    config = dataclasses.replace(CONFIG, stop="coverage", coverage=0.8)
    steps = Steps(cache, config, backend)
    first = steps.step(0)[1]
    for seed in range(1, 12):
        steps.step(seed)
    warm = steps.state.clone()
    assert (steps.step(0)[1] < first).all()
    steps.request(0)
    assert torch.equal(steps.step(0)[1][0], first[0])
    assert (steps.state[0] < warm[0]).all() and (steps.state[1] > 0.9 * warm[1]).all()


def prior_of(pages: float) -> BudgetPrior:
    log_needed = torch.full((1, 1, KV_HEADS), pages).log()
    return BudgetPrior(torch.tensor([50]), log_needed, prior_settings(CONFIG, PAGE))


def test_requests_start_from_the_prior_and_from_what_they_inherit(backend, cache) -> None:
    config = dataclasses.replace(CONFIG, stop="coverage", coverage=0.8)
    steps = Steps(cache, config, backend, prior_of(60))
    _, rounds, step = steps.step(0)
    assert (rounds == 1).all() and step.layer(0).one_round == 1
    assert step.layer(0).pages_attended == KV_HEADS * (60 + 41)
    steps.request(0)
    steps.wrapper.predictor.inherit(
        0, steps.table.generation(0), Snapshot(torch.zeros(1, KV_HEADS))
    )
    _, rounds, _ = steps.step(0)
    assert (rounds[0] > 1).all() and (rounds[1] == 1).all()
    assert steps.wrapper.stats.as_dict()["inherited"] == 1


def test_a_step_without_all_layers_teaches_nothing(backend, cache) -> None:
    steps = Steps(cache, CONFIG, backend)
    steps.step(0)
    steps.wrapper.stats.num_layers = 2
    before = steps.state.clone()
    steps.step(1)
    assert torch.equal(steps.state, before)


def test_the_prior_is_read_from_the_file_of_the_settings(tmp_path: Path, cache) -> None:
    path = tmp_path / "prior.json"
    prior_of(30).save(path)
    config = dataclasses.replace(CONFIG, budget_prior=str(path))
    wrapper, _ = make_wrapper(cache, config, "reference")
    assert float(wrapper.predictor.prior.log_needed.exp().mean()) == pytest.approx(30)
    wrong = dataclasses.replace(config, budget_prior=str(tmp_path / "none.json"))
    with pytest.raises(PriorError, match="calibrate"):
        make_wrapper(cache, wrong, "reference")


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="no effect without predict; set predict"):
        PSAConfig(budget_prior="prior.json")
    for policy in ("dense", "window", "topk", "swa", "top_p", "oracle_top_p"):
        with pytest.raises(ConfigError, match="choose policy psa"):
            PSAConfig(policy=policy, predict=True)
    assert PSAConfig(policy="oracle_marginal", predict=True).predict
    with pytest.raises(ConfigError, match="predict_rho"):
        PSAConfig(predict_rho=1.0)
    with pytest.raises(ConfigError, match="budget_prior=3: expected text"):
        PSAConfig(predict=True, budget_prior=3)


def test_the_least_is_what_is_read_without_prediction() -> None:
    config = PSAConfig(sink_pages=2, recent_pages=3, group_pages=5)
    assert least_pages(config) == 10


COVERAGE = dataclasses.replace(CONFIG, stop="coverage", coverage=0.8, scorer="sketch")


def sums_after(steps: Steps, *seeds: int) -> torch.Tensor:
    for seed in seeds:
        steps.step(seed)
    return steps.wrapper.predictor.residuals.sums.clone()


def test_coverage_is_conservative_until_there_are_residuals(backend, cache) -> None:
    config = dataclasses.replace(COVERAGE, predict=False, conservative=True)
    tracked, safe = Steps(cache, COVERAGE, backend), Steps(cache, config, backend)
    for row in (0, 1):  # the second after the first has residuals, and the other has not
        tracked.request(row)
        (out, rounds, step), (want, want_rounds, want_step) = tracked.step(row), safe.step(row)
        assert torch.equal(out[row], want[row]) and torch.equal(rounds[row], want_rounds[row])
        assert step.row(row).coverage == want_step.row(row).coverage
    assert not torch.equal(tracked.step(3)[0], safe.step(3)[0])


def test_the_next_step_starts_from_the_residuals_of_the_last(backend, cache, monkeypatch) -> None:
    calls = []
    attend = PSADecodeWrapper._attend

    def spy(wrapper, *args):
        calls.append(dict(zip(("kappa_start", "residuals"), args[-2:], strict=True)))
        return attend(wrapper, *args)

    monkeypatch.setattr(PSADecodeWrapper, "_attend", spy)
    steps = Steps(cache, COVERAGE, backend)
    sums = sums_after(steps, 0)[:, 0]
    assert (calls[0]["kappa_start"] == 0).all()
    assert torch.equal(calls[0]["residuals"], sums) and (sums[..., 0] >= 3).all()
    steps.step(1)
    mean = sums[..., 1] / sums[..., 0]
    want = mean + (sums[..., 2] / sums[..., 0] - mean.square()).sqrt() * KEPT_STD
    assert COVERAGE.correction_std < KEPT_STD
    torch.testing.assert_close(calls[1]["kappa_start"], want, rtol=1e-3, atol=1e-4)


def test_only_coverage_rows_keep_residuals(backend, cache) -> None:
    steps = Steps(cache, CONFIG, backend)
    steps.step(0)
    assert steps.wrapper.predictor.residuals.sums is None
    steps.request(1, psa_coverage=0.8)
    sums = sums_after(steps, 1, 2)
    assert (sums[0] == 0).all() and (sums[1, ..., 0] > 0).all()
    kept = dataclasses.replace(COVERAGE, conservative=True)
    steps = Steps(cache, kept, backend)
    steps.step(0)
    assert steps.wrapper.predictor.residuals.sums is None


def test_residuals_go_with_the_request_and_its_snapshot(backend, cache) -> None:
    steps = Steps(cache, COVERAGE, backend)
    warm = sums_after(steps, 0, 1, 2)
    snapshot = steps.wrapper.predictor.snapshot(0)
    assert torch.equal(snapshot.residuals, warm[0])
    assert torch.equal(snapshot.log_needed, steps.state[0])
    steps.request(0)
    again = sums_after(steps, 0)
    fresh = sums_after(Steps(cache, COVERAGE, backend), 0)
    torch.testing.assert_close(again[0], fresh[0])
    assert (again[1, ..., 0] > warm[1, ..., 0]).all()
    steps.request(1)
    steps.wrapper.predictor.inherit(1, steps.table.generation(1), snapshot)
    inherited = sums_after(steps, 4)
    assert (inherited[1, ..., 0] > DECAY * warm[0, ..., 0]).all()
