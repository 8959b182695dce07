"""Tail compensation: every implementation against a float64 run of the reference."""

import pytest
import torch
from kernel_cases import CASES, FP32, Batch, Case, assert_rounded, make_batch, true_log_mass
from sgl_psa_kernels import page_summary
from sgl_psa_kernels.progressive_decode import progressive_decode
from sgl_psa_kernels.tail_compensation import compensate

BACKENDS = ("reference", "torch")


def arguments(batch: Batch, seed: int = 5) -> dict:
    """Random outputs, estimates and choices; estimates of attended pages are no numbers."""
    case, rng = batch.case, torch.Generator().manual_seed(seed)
    rows, pages = batch.page_table.shape
    heads = case.num_kv_heads * case.group
    attended = (torch.rand(rows, case.num_kv_heads, pages, generator=rng) < 0.4).to(torch.uint8)
    attended[:, :, 0] = 1
    log_mass = 2 * torch.randn(rows, heads, pages, generator=rng)
    log_mass[attended.repeat_interleave(case.group, 1) == 1] = float("nan")
    for row in range(rows):
        log_mass[row, :, len(batch.pages(row)) :] = float("nan")
    means = torch.full((batch.num_pages, case.num_kv_heads, case.head_dim), float("nan"))
    for row in range(rows):
        mine = batch.pages(row)
        means[mine] = torch.randn(len(mine), *means.shape[1:], generator=rng)
        for head in range(case.num_kv_heads):
            read = attended[row, head, : len(mine)] == 1
            means[mine[read], head] = float("nan")
    lse = torch.randn(rows, heads, generator=rng) + 2
    lse[batch.seq_lens == 0] = -float("inf")
    out = torch.randn(rows, heads, case.head_dim, generator=rng).to(case.dtype)
    return {
        "out": out,
        "lse": lse,
        "log_mass": log_mass,
        "attended": attended,
        "value_means": means.bfloat16(),
        "page_table": batch.page_table,
        "seq_lens": batch.seq_lens,
        "active": torch.ones(rows, dtype=torch.uint8),
        "page_size": case.page_size,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_reference(case: Case, backend: str) -> None:
    given = arguments(make_batch(case))
    want = compensate(**{**given, "out": given["out"].double()}, backend="reference")
    got = compensate(**given, backend=backend)
    rows = given["seq_lens"] > 0
    # Shares sum to 1 and |values| < 6: float32 sums over the pages, and exp of differences of a few
    # nats, each with a relative error of about 2^-22.
    assert_rounded(got[rows], want[rows], 1e-5, case.dtype)
    changed = (got != given["out"]).any(-1).unflatten(1, (case.num_kv_heads, -1))[rows]
    place = torch.arange(given["attended"].shape[2])
    exists = place * case.page_size < given["seq_lens"][:, None]
    left = (exists[:, None] & (given["attended"] == 0)).any(-1)[rows]
    assert torch.equal(changed, left[..., None].expand_as(changed))
    assert torch.equal(got[~rows], given["out"][~rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_left_or_not_active_keeps_every_bit(backend: str) -> None:
    given = arguments(make_batch(Case(torch.bfloat16, 64, 16, 2, 3, (100, 0, 400, 300))))
    given["attended"][2] = 1
    given["active"][3] = 0
    got = compensate(**given, backend=backend)
    assert torch.equal(got[1:], given["out"][1:])
    assert not torch.equal(got[0], given["out"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_vanishing_masses(backend: str) -> None:
    """A tail far above or below what was read: its mean, or the output itself."""
    given = arguments(make_batch(Case(FP32, 16, 16, 1, 2, (64,))))
    given["attended"][0, 0] = torch.tensor([1, 1, 1, 0, *[1] * (given["attended"].shape[2] - 4)])
    given["value_means"] = torch.full_like(given["value_means"], 3.0)
    for mass, want in ((500.0, torch.full_like(given["out"], 3.0)), (-500.0, given["out"])):
        given["log_mass"][:, :, 3] = mass
        torch.testing.assert_close(compensate(**given, backend=backend), want, rtol=0, atol=0)
    given["log_mass"][:, :, 3] = -float("inf")
    assert torch.equal(compensate(**given, backend=backend), given["out"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_true_masses_and_constant_values_give_the_dense_output(backend: str) -> None:
    case = Case(FP32, 64, 16, 2, 3, (600, 47, 0))
    batch = make_batch(case)
    by_page = batch.v.view(-1, case.page_size, *batch.v.shape[1:])
    by_page[:] = by_page[:, :1].bfloat16().float()
    batch.v = torch.where(batch.k.isnan(), float("nan"), batch.v)
    mass = true_log_mass(batch).float()
    rows, zeros = len(case.lens), torch.zeros(len(case.lens))

    def decode(mode: int, **options) -> tuple[torch.Tensor, ...]:
        return progressive_decode(
            batch.q,
            batch.k,
            batch.v,
            batch.page_table,
            batch.seq_lens,
            mass,
            torch.full((rows,), mode, dtype=torch.int32),
            zeros - 1.0,
            zeros,
            zeros,
            page_size=16,
            sm_scale=batch.sm_scale,
            sink_pages=1,
            recent_pages=1,
            group_pages=2,
            backend="reference",
            **options,
        )

    attended = torch.empty(rows, 2, batch.page_table.shape[1], dtype=torch.uint8)
    out, lse, stats = decode(1, attended=attended)
    assert (stats[0, :, 0] < 30).all()
    means = torch.zeros(batch.num_pages, 2, 1, 64, dtype=torch.bfloat16)
    for row in range(rows):
        pages = batch.pages(row)
        fill = (case.lens[row] - 16 * torch.arange(len(pages))).clamp(max=16).int()
        page_summary.update(
            batch.v, pages, fill, means, kind="mean", page_size=16, backend="reference"
        )
    active = torch.ones(rows, dtype=torch.uint8)
    got = compensate(
        out,
        lse,
        mass,
        attended,
        means[:, :, 0],
        batch.page_table,
        batch.seq_lens,
        active,
        page_size=16,
        backend=backend,
    )
    dense = decode(0)[0]
    torch.testing.assert_close(got, dense, rtol=0, atol=5e-6)
    assert (out - dense).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend": "cpu"}, r"unknown backend 'cpu'; choose one of 'reference', 'torch'"),
        ({"attended": torch.zeros(1, 1, 1)}, r"attended must be torch\.uint8"),
        ({"value_means": torch.zeros(2, 1, 64)}, r"value_means must be torch\.bfloat16"),
        ({"lse": torch.zeros(1, 3)}, r"lse must have shape \[1, 2\]"),
        ({"page_size": 12}, "power of two"),
    ],
)
def test_bad_arguments_are_refused(change: dict, match: str) -> None:
    given = arguments(make_batch(Case(FP32, 64, 16, 1, 2, (40,))))
    with pytest.raises(ValueError, match=match):
        compensate(**{"backend": "torch", **given, **change})
