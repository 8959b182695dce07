"""The CPU layers give what SGLang's native ones give, and leave alone what they do not know."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import activation
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding import base
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang_psa import cpu_layers
from sglang_psa.hooks import HookNotApplied

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def method_layer(method, weight):
    layer = torch.nn.Module()
    layer.quant_method = method
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def native(module):
    """Norms and rotations dispatch by platform; here they must run torch, as on ours."""
    module._forward_method = module.forward_native
    return module


@pytest.fixture(params=[False, True], ids=["short", "wide"])
def wide(request, monkeypatch):
    monkeypatch.setattr(cpu_layers, "faster_in_float32", lambda dtype: request.param)
    monkeypatch.setattr(cpu_layers, "_PART", 1000)  # several parts a weight
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 4, 8, 9, 130])
def test_linear_and_head(wide, dtype, rows):
    weight, bias = random(1, 70, 48, dtype=dtype), random(2, 70, dtype=dtype)
    layers = torch.nn.ModuleList(
        method_layer(kind(), weight)
        for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    )
    counts = cpu_layers.install(layers)
    assert (counts["linear"], counts["head"]) == (1, 1)
    x = random(3, rows, 48, dtype=dtype)
    cpu_layers.calls.clear()
    exact = x.double() @ weight.double().T
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    got = layers[0].quant_method.apply(layers[0], x, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact + bias.double(), **close)
    got = layers[1].quant_method.apply(layers[1], x)
    torch.testing.assert_close(got.double(), exact, **close)
    ran = "torch"
    if dtype in cpu_layers.SHORT_TYPES and 0 < rows <= cpu_layers.MAX_ROWS:
        ran = "skinny_linear"
    elif dtype in cpu_layers.SHORT_TYPES and wide and rows >= cpu_layers.MIN_ROWS:
        ran = "wide_linear"
    assert cpu_layers.calls == {ran: 2}
    assert torch.equal(layers[1].quant_method.embedding(layers[1], torch.tensor([5])), weight[5:6])


def test_updated_weights_count_at_once(wide):
    layer = method_layer(UnquantizedLinearMethod(), random(1, 40, 32, dtype=torch.bfloat16))
    cpu_layers.install(layer)
    for rows in (1, 200):
        x = random(2, rows, 32, dtype=torch.bfloat16)
        before = layer.quant_method.apply(layer, x)
        layer.weight.data.mul_(2)
        assert torch.equal(layer.quant_method.apply(layer, x), 2 * before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype):
    module = native(RMSNorm(64, eps=1e-5)).to(dtype)
    module.weight.data.copy_(random(1, 64))
    x, residual = random(2, 5, 64, dtype=dtype), random(3, 5, 64, dtype=dtype)
    want, want_sum = module.forward_native(x.clone(), residual.clone())
    alone = module.forward_native(x.clone())
    assert cpu_layers.install(module)["norm"] == 1
    got, got_sum = module(x, residual)
    # The mean of squares is summed in another order, which may move a rounding by one place.
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(got, want, **close)
    assert torch.equal(got_sum, want_sum)
    torch.testing.assert_close(module(x), alone, **close)
    with_addition = module(x, residual, residual)
    torch.testing.assert_close(with_addition, module.forward_native(x, residual, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_rope(monkeypatch, dtype, neox):
    settings = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(base, "get_exec", lambda: settings)
    module = native(RotaryEmbedding(32, 32, 100, 10000, neox, dtype))
    module.cos_sin_cache = module.cos_sin_cache.to(dtype)
    positions = torch.tensor([3, 0, 99])
    packed = random(1, 3, 6 * 32, dtype=dtype)
    q, k = packed[:, :128], packed[:, 128:160]
    want = module.forward_native(positions, q.clone(), k.clone())
    assert cpu_layers.install(module)["rope"] == 1
    got = module(positions, q, k)
    for one, other in zip(got, want, strict=True):
        atol = 1e-6 if dtype == torch.float32 else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    heads = module(positions, q.unflatten(1, (4, 32)), k.unflatten(1, (1, 32)))
    again = module.forward_native(positions, q, k)
    assert torch.equal(heads[0].flatten(1), again[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(monkeypatch, dtype):
    settings = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(activation, "get_exec", lambda: settings)
    module = native(SiluAndMul())
    x = random(1, 5, 2 * 24, dtype=dtype)
    want = module.forward_native(x)
    assert cpu_layers.install(module)["activation"] == 1
    # Torch rounds SiLU before it multiplies.
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(module(x), want, **close)


def test_other_kinds_are_left_alone():
    other = [
        native(RMSNorm(64, cast_x_before_out_mul=True)),
        native(RMSNorm(64, fp32_residual=True)),
        native(RMSNorm(64, var_hidden_size=32)),
        GemmaRMSNorm(64),
        native(GeluAndMul()),
        torch.nn.Linear(4, 4),
    ]
    before = [getattr(module, "_forward_method", None) for module in other]
    assert not any(cpu_layers.install(torch.nn.ModuleList(other)).values())
    assert [getattr(module, "_forward_method", None) for module in other] == before


def test_a_layer_that_does_not_run_its_native_forward_stops_the_start():
    module = RMSNorm(64)
    module._forward_method = module.forward_cuda
    with pytest.raises(HookNotApplied, match="RMSNorm does not run its forward_native"):
        cpu_layers.install(module)
