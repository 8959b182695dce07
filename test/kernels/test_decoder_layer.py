"""A decoder layer against a float64 run of its specification, and against its operators."""

import pytest
import torch
from sgl_psa_kernels import decoder_layer
from sgl_psa_kernels.decoder_layer import LayerMemory, LayerSettings, LayerSizes, LayerWeights
from sgl_psa_kernels.rms_norm import rms_norm
from sgl_psa_kernels.rope import rope
from sgl_psa_kernels.silu_and_mul import silu_and_mul
from sgl_psa_kernels.skinny_linear import skinny_linear

WIDTH, INNER, POSITIONS = 96, 160, 50
SETTINGS = LayerSettings(4, 2, 32, 1e-6, 1e-5, False)


def make_weights(dtype: torch.dtype, bias: bool, seed: int = 0) -> LayerWeights:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * std).to(dtype)

    qkv = sum(SETTINGS.widths)
    return LayerWeights(
        norm=1 + normal(WIDTH),
        qkv=normal(qkv, WIDTH),
        qkv_bias=normal(qkv) if bias else None,
        out=normal(WIDTH, SETTINGS.widths[0]),
        out_bias=normal(WIDTH) if bias else None,
        norm_after=1 + normal(WIDTH),
        gate_up=normal(2 * INNER, WIDTH),
        down=normal(WIDTH, INNER),
        cos_sin=torch.cat([normal(POSITIONS, 16).cos(), normal(POSITIONS, 16).sin()], 1),
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Something of the right shape that needs all three."""
    return (q + torch.cat([k * 0.5, v], 1)).contiguous()


def given(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(rows)
    hidden, residual = torch.randn(2, rows, WIDTH, generator=rng).to(dtype)
    return torch.randint(0, POSITIONS, (rows,), generator=rng), hidden, residual


def make(weights: LayerWeights, rows: int, backend: str) -> decoder_layer.Layer:
    memory = LayerMemory(LayerSizes.of(weights, SETTINGS, rows))
    return decoder_layer.make_layer(weights, SETTINGS, memory, backend=backend)


def double(weights: LayerWeights) -> LayerWeights:
    return LayerWeights(*(None if w is None else w.double() for w in weights))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matches_float64_reference(dtype, rows, first, bias, isa) -> None:
    weights = make_weights(dtype, bias)
    positions, hidden, residual = given(dtype, rows)
    residual = None if first else residual
    got = make(weights, rows, "cpu")(positions, hidden, residual, attend)
    exact = None if residual is None else residual.double()
    want = make(double(weights), rows, "reference")(positions, hidden.double(), exact, attend)
    # A dozen roundings to dtype, of sums of a hundred terms.
    tolerance = 16 * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.std().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_its_operators_bit_for_bit(dtype) -> None:
    """Two layers that share their memory, called twice: nothing is left of the first call."""
    rows, backend = 4, "cpu"
    both = [make_weights(dtype, bias=True, seed=seed) for seed in (1, 2)]
    memory = LayerMemory(LayerSizes.of(both[0], SETTINGS, rows))
    layers = [decoder_layer.make_layer(w, SETTINGS, memory, backend=backend) for w in both]
    positions, hidden, _ = given(dtype, rows)
    for _ in range(2):
        x, total = hidden, None
        y, stream = hidden, None
        for w, layer in zip(both, layers, strict=True):
            x, total = layer(positions, x, total, attend)
            normed, stream_now = rms_norm(y, w.norm, stream, eps=SETTINGS.eps, backend=backend)
            stream = y if stream_now is None else stream_now
            qkv = skinny_linear(normed, w.qkv, w.qkv_bias, backend=backend)
            q, k, v = qkv.split(SETTINGS.widths, dim=-1)
            rope(positions, q, k, w.cos_sin, head_dim=32, interleaved=False, backend=backend)
            y = skinny_linear(attend(q, k, v), w.out, w.out_bias, backend=backend)
            y, stream = rms_norm(y, w.norm_after, stream, eps=SETTINGS.eps_after, backend=backend)
            y = silu_and_mul(skinny_linear(y, w.gate_up, None, backend=backend), backend=backend)
            y = skinny_linear(y, w.down, None, backend=backend)
        assert torch.equal(x, y)
        assert torch.equal(total, stream)


def test_weights_are_read_where_they_lie() -> None:
    weights = make_weights(torch.bfloat16, bias=False)
    positions, hidden, residual = given(torch.bfloat16, 2)
    layer = make(weights, 2, "cpu")
    before = layer(positions, hidden, residual, attend)[0].clone()
    weights.down.mul_(2)
    assert torch.equal(layer(positions, hidden, residual, attend)[0], 2 * before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_does_not_belong_together_is_refused(backend: str) -> None:
    weights = make_weights(torch.float32, bias=False)
    memory = LayerMemory(LayerSizes.of(weights, SETTINGS, 2))

    def refused(match: str, weights=weights, settings=SETTINGS, memory=memory) -> None:
        with pytest.raises(ValueError, match=match):
            decoder_layer.make_layer(weights, settings, memory, backend=backend)

    refused("decoder_layer: down must be", weights._replace(down=weights.down.half()))
    refused("decoder_layer: qkv must be", settings=SETTINGS._replace(num_qo_heads=8))
    refused("the memory is for", memory=LayerMemory(memory.sizes._replace(inner=32)))
    positions = torch.tensor([0, POSITIONS])
    layer = decoder_layer.make_layer(weights, SETTINGS, memory, backend=backend)
    with pytest.raises(ValueError, match="positions"):
        layer(positions, *given(torch.float32, 2)[1:], attend)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be 1 to 8, got 9"):
        make(make_weights(torch.float32, bias=False), 9, "cpu")
