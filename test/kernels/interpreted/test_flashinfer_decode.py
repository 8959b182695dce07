"""Backend "flashinfer" against a float64 run of the reference; a stand-in attends the rows."""

import inspect
import sys
from dataclasses import replace

import flashinfer_stand_in
import pytest
import torch
from kernel_cases import BF16, FP16, FP32, Batch, Case, assert_rounded, make_batch
from sgl_psa_kernels.progressive_decode import (
    STAT_NAMES,
    flashinfer_backend,
    flashinfer_rows,
    triton_backend,
)
from sgl_psa_kernels.progressive_decode.flashinfer_backend import head_pages
from test_progressive_decode import INF, RULES, decode, estimates
from test_triton_decode import NoWordToTheHost
from torch.utils._python_dispatch import _disable_current_modes

from sgl_psa.backends import check_cache, resolve_backend
from sgl_psa.config import ConfigError, PSAConfig
from test.method.cache import PAGE, make_cache, make_wrapper
from test.method.cache import decode as step_of

MIXED = [RULES[name] for name in RULES]
STAND_IN = flashinfer_stand_in.BatchDecodeWithPagedKVCacheWrapper


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """FlashInfer's place, without plans of before."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in)
    monkeypatch.setattr(flashinfer_rows, "flashinfer_available", lambda: (True, ""))
    monkeypatch.setattr(STAND_IN, "plans", 0)
    flashinfer_rows.planned.cache_clear()
    yield
    flashinfer_rows.planned.cache_clear()


@pytest.fixture
def attended_rows(monkeypatch):
    """Tokens that FlashInfer's rows had, a list a call."""
    found = []
    run = STAND_IN.run

    def counted(self, *args, **options):
        found.append((self.last_page_len + self.page_size * (self.indptr.diff() - 1)).tolist())
        assert len(found[-1]).bit_count() == 1
        return run(self, *args, **options)

    monkeypatch.setattr(STAND_IN, "run", counted)
    return found


def heads_apart(cache: torch.Tensor) -> torch.Tensor:
    """A copy in the order [Hkv, slots, D] of memory."""
    return cache.transpose(0, 1).contiguous().transpose(0, 1)


def compare(batch: Batch, log_mass, rules, **options) -> None:
    out, lse, stats = decode(batch, log_mass, rules, "flashinfer", **options)
    want = decode(batch, log_mass, rules, "reference", exact=True, **options)
    coverage = STAT_NAMES.index("estimated_coverage")
    counts = [column for column in range(len(STAT_NAMES)) if column != coverage]
    assert torch.equal(stats[..., counts], want[2][..., counts])
    torch.testing.assert_close(stats, want[2], rtol=1e-4, atol=1e-5)
    live = torch.tensor(batch.case.lens) > 0
    torch.testing.assert_close(lse[live].double(), want[1][live], rtol=4e-6, atol=4e-6)
    assert (lse[~live] == -INF).all() and (out[~live] == 0).all()
    # Results of rows are rounded to the type of the queries before they are merged.
    unit = torch.finfo(batch.case.dtype).eps
    noise = 2e-5 + 2 * unit * float(batch.v.nan_to_num(0.0).abs().max())
    assert_rounded(out[live], want[0][live], noise, batch.case.dtype)


@pytest.mark.parametrize(
    ("case", "start", "predicted"),
    [
        (Case(FP16, 64, 16, 1, 3, (310, 0, 131, 300, 130, 1, 140, 299)), 0, False),
        (Case(FP16, 64, 16, 2, 1, (310, 0, 131, 400, 1)), 0, True),
        (Case(FP16, 128, 64, 1, 5, (640, 130)), 1, True),
        (Case(BF16, 64, 256, 2, 2, (700, 1300)), 0, False),
    ],
    ids=str,
)
def test_matches_float64_reference(case: Case, start: int, predicted: bool, attended_rows) -> None:
    batch = make_batch(case)
    rows = len(case.lens)
    options = {}
    if predicted:
        first = 4 + torch.arange(rows * case.num_kv_heads, dtype=torch.int32)
        options["first_pages"] = first.view(rows, -1)
    compare(batch, estimates(batch), MIXED[start : start + rows], **options)
    wide = 3 * case.page_size >= triton_backend.WIDE_TOKENS
    assert len(attended_rows) == 1 + max(predicted, 2 * wide)
    assert all(max(rows) > 0 for rows in attended_rows[: 1 + predicted])


def test_a_dense_batch_is_attended_by_flashinfer_alone(attended_rows) -> None:
    batch = make_batch(Case(FP16, 64, 16, 2, 2, (300, 0, 1)))
    compare(batch, None, RULES["dense"])
    # Two KV heads; 300 tokens are rows of 128, 128 and 44.
    assert sum(attended_rows[0]) == 2 * 301


@pytest.mark.parametrize(("name", "value"), [("SHARE", 0.0625), ("ROWS", 2)])
def test_triton_attends_what_the_rows_have_no_room_for(
    name: str, value: float, monkeypatch, attended_rows
) -> None:
    monkeypatch.setattr(flashinfer_backend, name, value)
    batch = make_batch(Case(FP16, 64, 16, 1, 2, (1000, 290)))
    compare(batch, estimates(batch), [RULES["dense"], RULES["marginal-.02"]], group_pages=16)
    assert sum(attended_rows[0]) < 300


def test_rules_that_compare_masses_stay_with_triton(attended_rows) -> None:
    batch = make_batch(Case(FP16, 64, 16, 1, 2, (300,)))
    compare(batch, estimates(batch), RULES["conservative-.8"], group_pages=16)
    assert attended_rows and not any(map(any, attended_rows))


def test_heads_apart_are_read_where_they_lie() -> None:
    batch = make_batch(Case(FP16, 64, 16, 2, 2, (300, 40)))
    apart = [heads_apart(t) for t in (batch.k, batch.v)]
    assert apart[0].stride() != batch.k.stride()
    compare(replace(batch, k=apart[0], v=apart[1]), estimates(batch), RULES["marginal-.02"])


def test_one_plan_serves_all_steps_of_a_shape() -> None:
    for seed in range(3):
        batch = make_batch(Case(FP16, 64, 16, 1, 2, (300 + 40 * seed,)), seed)
        compare(batch, estimates(batch), RULES["marginal-.3"])
    assert STAND_IN.plans == 1


def test_nothing_waits_for_the_device(monkeypatch) -> None:
    run = STAND_IN.run

    def unseen(self, *args, **options):
        with _disable_current_modes():
            return run(self, *args, **options)

    monkeypatch.setattr(STAND_IN, "run", unseen)
    batch = make_batch(Case(FP16, 64, 16, 1, 2, (300,)))
    step = (batch, estimates(batch), [RULES["marginal-.02"]], "flashinfer")
    first = torch.tensor([[12]], dtype=torch.int32)
    decode(*step, first_pages=first)
    with NoWordToTheHost():
        decode(*step, first_pages=first)


def test_a_step_of_the_method_is_that_of_triton(attended_rows) -> None:
    cache = make_cache([30 * PAGE + 3, 1], 1, 64, seed=3, sharp=3.0)
    cache = replace(cache, k=cache.k.half(), v=cache.v.half())
    q = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(4)).half()
    config = PSAConfig(min_context=0, group_pages=256 // PAGE, delta=0.05)
    steps = {}
    for name in ("triton", "flashinfer"):
        backend = resolve_backend(name, "cpu")
        wrapper, _ = make_wrapper(cache, config, backend)
        steps[name] = step_of(wrapper, cache, q, 64**-0.5)
    (want, counted), (got, step) = steps.values()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)
    assert counted is not None and step is not None
    assert step.row(0).pages_attended == counted.row(0).pages_attended < 30
    assert sum(map(max, attended_rows)) > 0


def test_what_flashinfer_lacks_is_refused() -> None:
    batch = make_batch(Case(FP32, 64, 16, 1, 2, (100,)))
    with pytest.raises(ValueError, match="float16 or bfloat16, got float32; use backend 'triton'"):
        decode(batch, None, RULES["dense"], "flashinfer")
    batch = make_batch(Case(FP16, 80, 16, 1, 2, (100,)))
    with pytest.raises(ValueError, match="64, 128, 256 elements, got 80"):
        decode(batch, None, RULES["dense"], "flashinfer")
    with pytest.raises(ConfigError, match=r"backend=flashinfer: .* got 80; use backend 'triton'"):
        check_cache("flashinfer", FP16, 80)
    batch = make_batch(Case(FP16, 64, 16, 2, 2, (100,)))
    with pytest.raises(ValueError, match="equal strides"):
        head_pages(batch.k, heads_apart(batch.v), 16)


def test_no_plan_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shape = flashinfer_rows.RowShape(torch.device("cuda"), FP16, 1, 1, 64, 16, 1.0)
    with pytest.raises(RuntimeError, match="run the step once before"):
        flashinfer_rows.planned(shape)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(flashinfer_rows, "flashinfer_available", lambda: (False, "install it"))
    batch = make_batch(Case(FP16, 64, 16, 1, 2, (100,)))
    with pytest.raises(RuntimeError, match="progressive_decode: install it"):
        decode(batch, None, RULES["dense"], "flashinfer")


def test_the_stand_in_takes_what_flashinfer_takes(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "flashinfer")
    real = pytest.importorskip("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    for method in ("__init__", "reset_workspace_buffer", "run"):
        names = set(inspect.signature(getattr(STAND_IN, method)).parameters)
        assert names <= set(inspect.signature(getattr(real, method)).parameters)
    names = set(inspect.signature(STAND_IN.plan).parameters)
    assert names <= set(inspect.signature(real._plan_impl).parameters)
