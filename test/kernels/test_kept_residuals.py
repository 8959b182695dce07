"""Progressive decode that starts with a known correction and tells the residuals that it saw."""

import pytest
import torch
from kernel_cases import CASES, Case, make_batch, true_log_mass
from sgl_psa_kernels.progressive_decode import COVERAGE, STAT_NAMES
from test_progressive_decode import RULES, check, decode, estimates, solved

INF = float("inf")
PAGES, ROUNDS = STAT_NAMES.index("pages_attended"), STAT_NAMES.index("rounds")
COVERAGES = [name for name in RULES if name.startswith(("coverage", "conservative"))]
SMALL = Case(torch.float32, 64, 16, 2, 3, (560, 16, 0, 600, 500))


def starts(case: Case, seed: int = 11) -> torch.Tensor:
    """Corrections of both signs, [B, Hq]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(case.lens), case.num_kv_heads * case.group, generator=rng)


def told(case: Case) -> torch.Tensor:
    return torch.full((len(case.lens), case.num_kv_heads * case.group, 3), float("nan"))


@pytest.mark.parametrize("rule", ["coverage-.8", "coverage-.95-bold", "conservative-.5-bold"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_reference(case: Case, rule: str, backend: str) -> None:
    """Ragged, stale and empty rows."""
    batch, log_mass, _ = solved(case, rule)
    want_sums, sums = told(case), told(case)
    kappa = starts(case)
    want = decode(
        batch, log_mass, RULES[rule], "reference", True, kappa_start=kappa, residuals=want_sums
    )
    got = decode(batch, log_mass, RULES[rule], backend, kappa_start=kappa, residuals=sums)
    check(batch, got, want)
    assert torch.equal(sums[..., 0], want_sums[..., 0])
    torch.testing.assert_close(sums, want_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_residuals_are_of_every_page_attended(rule: str, backend: str) -> None:
    batch = make_batch(SMALL)
    log_mass = estimates(batch)
    log_mass[3, :, 7] = -INF
    shape = (len(SMALL.lens), 2, batch.page_table.shape[1])
    attended, sums = torch.zeros(shape, dtype=torch.uint8), told(SMALL)
    decode(batch, log_mass, RULES[rule], backend, attended=attended, residuals=sums)
    if rule not in COVERAGES:
        assert (sums == 0).all()
        return
    truth = true_log_mass(batch)
    seen = attended.bool().repeat_interleave(3, 1)
    stale = (~(log_mass < INF)).unflatten(1, (2, 3)).any(2).repeat_interleave(3, 1)
    seen &= ~stale & (log_mass > -INF)
    x = (truth - log_mass.double()).masked_fill(~seen, 0.0)
    want = torch.stack([seen.sum(-1), x.sum(-1), x.square().sum(-1)], -1)
    torch.testing.assert_close(sums.double(), want.double(), rtol=1e-4, atol=1e-4)
    assert (sums[2] == 0).all() and (sums[[0, 3, 4], :, 0] > 3).all()


@pytest.mark.parametrize("rule", RULES)
def test_telling_residuals_changes_nothing_else(rule: str, backend: str) -> None:
    batch = make_batch(SMALL)
    log_mass = estimates(batch)
    plain = decode(batch, log_mass, RULES[rule], backend)
    telling = decode(batch, log_mass, RULES[rule], backend, residuals=told(SMALL))
    for a, b in zip(plain, telling, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["dense", "marginal-.3", "marginal-.02"])
def test_rules_without_correction_ignore_the_start(rule: str, backend: str) -> None:
    batch = make_batch(SMALL)
    log_mass = estimates(batch)
    plain = decode(batch, log_mass, RULES[rule], backend)
    started = decode(batch, log_mass, RULES[rule], backend, kappa_start=starts(SMALL) + 9)
    for a, b in zip(plain, started, strict=True):
        assert torch.equal(a, b)


def test_the_start_is_in_force_before_the_first_group_and_after_it(backend: str) -> None:
    """Estimates 2 nats too low, a rule that they would satisfy at once, and the truth would not."""
    batch = make_batch(SMALL)
    log_mass = (true_log_mass(batch) - 2.0).float()
    rule = (COVERAGE, 0.3, -INF, 0.0)

    def stats(**options) -> torch.Tensor:
        return decode(batch, log_mass, rule, backend, recent_pages=12, **options)[2]

    plain, zeros = stats(), torch.zeros_like(starts(SMALL))
    corrected, far = stats(kappa_start=zeros + 2.0), stats(kappa_start=zeros + 50.0)
    long = [0, 3, 4]
    assert (plain[long][..., ROUNDS] == 0).all()
    assert (corrected[long][..., ROUNDS] > 0).all()
    assert (corrected[long][..., PAGES] < far[long][..., PAGES]).all()
    assert (far[0, :, PAGES] == 35).all()
    # A start below what the groups show does not hold.
    low = stats(kappa_start=zeros + 1.0)
    assert (low[long][..., PAGES] <= corrected[long][..., PAGES]).all()


@pytest.mark.parametrize("name", ["kappa_start", "residuals"])
def test_bad_shapes_are_refused(name: str, backend: str) -> None:
    batch = make_batch(SMALL)
    with pytest.raises(ValueError, match=name):
        decode(batch, estimates(batch), RULES["coverage-.8"], backend, **{name: torch.zeros(5, 2)})
