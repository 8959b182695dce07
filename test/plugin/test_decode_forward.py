"""Layers called as one in decode steps give what they give otherwise, or step aside."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import activation
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding import base
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_psa import compat, cpu_layers, decoder_layer

HEADS, KV_HEADS, DIM, WIDTH, INNER = 4, 2, 32, 96, 160


class Linear(torch.nn.Module):
    """What a layer sees of SGLang's parallel linear layers."""

    tp_size, skip_bias_add, gather_output, use_decode_attn_tp = 1, False, False, False

    def __init__(self, columns, rows, dtype, bias=False):
        super().__init__()
        self.quant_method = UnquantizedLinearMethod()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns).to(dtype) * 0.2, False)
        self.bias = torch.nn.Parameter(torch.randn(rows).to(dtype), False) if bias else None

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class Attention(torch.nn.Module):
    """Attends to nothing, but needs all that it is given."""

    v_head_dim = DIM

    def forward(self, q, k, v, forward_batch):
        forward_batch.seen.append(len(q))
        return q + torch.cat([k * 0.5, v], 1)


class Layer(torch.nn.Module):
    """The ``forward`` of SGLang's LlamaDecoderLayer on its parts."""

    def __init__(self, dtype=torch.bfloat16, bias=False):
        super().__init__()
        q, kv = HEADS * DIM, KV_HEADS * DIM
        self.self_attn = attention = torch.nn.Module()
        attention.num_heads, attention.num_kv_heads, attention.head_dim = HEADS, KV_HEADS, DIM
        attention.qkv_proj = Linear(WIDTH, q + 2 * kv, dtype, bias)
        attention.o_proj = Linear(q, WIDTH, dtype, bias)
        attention.rotary_emb = self.native(RotaryEmbedding(DIM, DIM, 100, 10000, True, dtype))
        attention.rotary_emb.cos_sin_cache = attention.rotary_emb.cos_sin_cache.to(dtype)
        attention.attn = Attention()
        self.mlp = torch.nn.Module()
        self.mlp.gate_up_proj = Linear(WIDTH, 2 * INNER, dtype)
        self.mlp.down_proj = Linear(INNER, WIDTH, dtype)
        self.mlp.act_fn = self.native(SiluAndMul())
        self.input_layernorm = self.native(RMSNorm(WIDTH)).to(dtype)
        self.post_attention_layernorm = self.native(RMSNorm(WIDTH, eps=1e-5)).to(dtype)

    @staticmethod
    def native(module):
        module._forward_method = module.forward_native
        return module

    def forward(self, positions, hidden_states, forward_batch, residual):
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        qkv, _ = self.self_attn.qkv_proj(hidden_states)
        q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        q, k = self.self_attn.rotary_emb(positions, q, k)
        hidden_states, _ = self.self_attn.o_proj(self.self_attn.attn(q, k, v, forward_batch))
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        gate_up, _ = self.mlp.gate_up_proj(hidden_states)
        return self.mlp.down_proj(self.mlp.act_fn(gate_up))[0], residual


@pytest.fixture(autouse=True)
def known(monkeypatch):
    settings = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    for module in (base, activation):
        monkeypatch.setattr(module, "get_exec", lambda: settings)
    monkeypatch.setattr(decoder_layer, "KINDS", (Layer,))
    cpu_layers.calls.clear()
    torch.manual_seed(0)


def model(count=2, **settings):
    made = torch.nn.ModuleList(Layer(**settings) for _ in range(count))
    for layer in made:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.normal_(1, 0.2)
    return made


def install(layers):
    """How many layers are called as one."""
    cpu_layers.install(layers)
    return decoder_layer.install(layers)


def batch(mode=ForwardMode.DECODE):
    return SimpleNamespace(forward_mode=mode, seen=[])


def run(layers, rows=3, mode=ForwardMode.DECODE, apart=False):
    """The result of all layers; ``apart``: by the ``forward`` of their class."""
    rng = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=rng).to(layers[0].mlp.down_proj.weight.dtype)
    positions, residual = torch.randint(0, 100, (rows,), generator=rng), None
    for layer in layers:
        forward = Layer.forward.__get__(layer) if apart else layer
        hidden, residual = forward(positions, hidden, batch(mode), residual)
    return torch.stack([hidden, residual])


def test_the_classes_are_sglangs():
    assert set(compat.IMPORTS) >= {"LlamaDecoderLayer", "Qwen2DecoderLayer"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_same_bits_as_part_by_part(rows, bias):
    layers = model(bias=bias)
    assert install(layers) == 2
    want = run(layers, rows, apart=True)
    cpu_layers.calls.clear()
    assert torch.equal(run(layers, rows), want)
    kernels = {name: 2 * n for name, n in decoder_layer.KERNELS.items()}
    assert decoder_layer.calls() == {"decoder_layer": 2, **kernels}
    assert torch.equal(run(layers, rows), want)


@pytest.mark.parametrize("given", [{"rows": 9}, {"mode": ForwardMode.EXTEND}], ids=str)
def test_larger_batches_and_prefill_go_the_layers_own_way(given):
    layers = model()
    install(layers)
    want = run(layers, **given, apart=True)
    assert torch.equal(run(layers, **given), want)
    assert "decoder_layer" not in cpu_layers.calls


def test_hooks_on_parts_are_served():
    layers, seen = model(), []
    install(layers)
    layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    run(layers)
    assert len(seen) == 1
    assert cpu_layers.calls["decoder_layer"] == 1


@pytest.mark.parametrize("way", ["in place", "another tensor", "another parameter"])
def test_new_weights_count_at_once(way):
    layers = model()
    install(layers)
    run(layers)
    down = layers[0].mlp.down_proj
    if way == "in place":
        down.weight.data.mul_(2)
    elif way == "another tensor":
        down.weight.data = down.weight.data * 2
    else:
        down.weight = torch.nn.Parameter(down.weight.data * 2, False)
    assert torch.equal(run(layers), run(layers, apart=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp.down_proj, "tp_size", 2),
        lambda layer: setattr(layer.self_attn.o_proj, "skip_bias_add", True),
        lambda layer: setattr(layer.self_attn.qkv_proj, "quant_method", object()),
        lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()),
        lambda layer: setattr(layer, "input_layernorm", RMSNorm(WIDTH, fp32_residual=True)),
        lambda layer: setattr(layer.self_attn.attn, "v_head_dim", 16),
        lambda layer: layer.float(),
    ],
)
def test_layers_with_other_parts_are_left_alone(change):
    layers = model()
    change(layers[1])
    assert install(layers) == 1
    assert isinstance(layers[0].forward, decoder_layer.DecodeForward)
    assert not isinstance(layers[1].forward, decoder_layer.DecodeForward)


def test_subclasses_are_left_alone(monkeypatch):
    class Other(Layer):
        pass

    assert install(torch.nn.ModuleList([Other()])) == 0
