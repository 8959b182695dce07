"""The ops of the layers around attention: C++ against float64, torch's rounding, bad input."""

import pytest
import torch
from sgl_psa_kernels._native import call
from sgl_psa_kernels.rms_norm import rms_norm
from sgl_psa_kernels.rope import rope
from sgl_psa_kernels.silu_and_mul import silu_and_mul
from sgl_psa_kernels.skinny_linear import MAX_ROWS, skinny_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: Half a unit in the last place of a value of 1.
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor, float32_error: float) -> None:
    """``got`` is ``exact`` (float64) but for one rounding and an error of float32 work."""
    allowed = ULP[got.dtype] * exact.abs() * 1.01 + float32_error + 1e-7
    excess = (got.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"{excess.max()} too far"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_skinny_linear_matches_float64(isa: str, dtype: torch.dtype, rows: int) -> None:
    # The last one is wider than a block of columns for any number of rows.
    for inner, outer in ((1, 1), (31, 33), (64, 5), (200, 67), (8200, 37)):
        x, weight = normal(1, rows, inner, dtype=dtype), normal(2, outer, inner, dtype=dtype)
        bias = normal(3, outer, dtype=dtype) if outer % 2 else None
        got = skinny_linear(x, weight, bias, backend="cpu")
        assert got.dtype == dtype
        wide = None if bias is None else bias.double()
        exact = skinny_linear(x.double(), weight.double(), wide, backend="reference")
        terms = x.double().abs() @ weight.double().abs().T
        assert_rounded_once(got, exact, float(terms.max()) * 2.0**-24 * 16)


def test_skinny_linear_takes_slices_and_threads(isa: str) -> None:
    whole = normal(1, 5, 96, dtype=torch.bfloat16)
    weights = normal(2, 300, 128, dtype=torch.bfloat16)
    x, weight = whole[1:4, 16:80], weights[:, :64]
    want = skinny_linear(x.contiguous(), weight.contiguous(), backend="cpu")
    assert torch.equal(skinny_linear(x, weight, backend="cpu"), want)
    torch.set_num_threads(2)
    try:
        assert torch.equal(skinny_linear(x, weight, backend="cpu"), want)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 50, 128])
def test_rms_norm_matches_float64(isa: str, dtype: torch.dtype, dim: int) -> None:
    x = 3 * normal(1, 17, 2 * dim, dtype=dtype)[:, :dim]
    weight, residual = normal(2, dim, dtype=dtype), normal(3, 17, dim, dtype=dtype)
    for other in (None, residual):
        got, total = rms_norm(x, weight, other, eps=1e-5, backend="cpu")
        wide = None if other is None else other.double()
        exact, exact_total = rms_norm(
            x.double(), weight.double(), wide, eps=1e-5, backend="reference"
        )
        assert_rounded_once(got, exact, float(exact.abs().max()) * 2.0**-22)
        assert (total is None) == (exact_total is None)
        if total is not None and exact_total is not None:
            assert_rounded_once(total, exact_total, float(exact_total.abs().max()) * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_leading_dimensions(isa: str, dtype: torch.dtype) -> None:
    x, weight = normal(1, 2, 3, 24, dtype=dtype), normal(2, 24, dtype=dtype)
    got, _ = rms_norm(x, weight, eps=1e-6, backend="cpu")
    rows, _ = rms_norm(x.view(6, 24), weight, eps=1e-6, backend="cpu")
    assert torch.equal(got.view(6, 24), rows)
    assert rms_norm(x[:0], weight, eps=1e-6, backend="cpu")[0].shape == (0, 3, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotary", [(64, 64), (48, 20), (128, 128), (40, 2)])
def test_rope_matches_torch(
    isa: str, dtype: torch.dtype, interleaved: bool, head_dim: int, rotary: int
) -> None:
    tokens, table = 19, normal(4, 30, rotary).clamp(-1, 1).to(dtype)
    positions = torch.randint(0, 30, (tokens,), generator=torch.Generator().manual_seed(5))
    packed = normal(6, tokens, 5 * head_dim + 3, dtype=dtype)
    want = packed.clone()
    for x, backend in ((packed, "cpu"), (want, "reference")):
        q, k = x[:, : 3 * head_dim], x[:, 3 * head_dim : 5 * head_dim]
        rope(positions, q, k, table, head_dim=head_dim, interleaved=interleaved, backend=backend)
    if dtype == torch.float32:
        torch.testing.assert_close(packed, want, rtol=0, atol=1e-6)  # fused multiply-add
    else:
        assert torch.equal(packed, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 50])
def test_silu_and_mul_matches_float64(isa: str, dtype: torch.dtype, dim: int) -> None:
    x = 8 * normal(1, 17, 2 * dim + 3, dtype=dtype)[:, : 2 * dim]
    x[:4, 0] = torch.tensor([-200.0, -90.0, 90.0, 200.0])
    got = silu_and_mul(x, backend="cpu")
    exact = silu_and_mul(x.double(), backend="reference")
    assert_rounded_once(got, exact, float(exact.abs().max()) * 2.0**-22)
    parts = silu_and_mul(x.contiguous().view(1, 17, 2 * dim), backend="cpu")
    assert torch.equal(parts, got[None])
    assert silu_and_mul(x[:0], backend="cpu").shape == (0, dim)


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(2, 8)
    for backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match="1 to 8 rows"):
            skinny_linear(torch.zeros(9, 8), x, backend=backend)
        with pytest.raises(ValueError, match=r"\[N, 8\]"):
            skinny_linear(x, torch.zeros(3, 7), backend=backend)
        with pytest.raises(ValueError, match="one float dtype"):
            skinny_linear(x, x.half(), backend=backend)
        with pytest.raises(ValueError, match="bias must be"):
            skinny_linear(x, x, torch.zeros(3), backend=backend)
        with pytest.raises(ValueError, match="does not fit"):
            rms_norm(x, torch.ones(4), eps=1e-6, backend=backend)
        with pytest.raises(ValueError, match="residual"):
            rms_norm(x, torch.ones(8), x[:1], eps=1e-6, backend=backend)
        with pytest.raises(ValueError, match=r"2 \* D"):
            silu_and_mul(x[:, :7], backend=backend)
        with pytest.raises(ValueError, match="float dtype"):
            silu_and_mul(x.int(), backend=backend)
        for position in (-1, 4):
            with pytest.raises(ValueError, match="outside of cos_sin"):
                rope(
                    torch.tensor([0, position]),
                    x,
                    x.clone(),
                    torch.zeros(4, 8),
                    head_dim=8,
                    interleaved=False,
                    backend=backend,
                )
    with pytest.raises(ValueError, match="use backend='reference'"):
        skinny_linear(x.double(), x.double(), backend="cpu")
    assert call.load().psa_isa()
