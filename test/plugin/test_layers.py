"""Models with attention that psa would compute wrongly are refused when they are loaded."""

import pytest
import torch
from sglang_psa import layers
from sglang_psa.layers import UnsupportedLayer

from test.plugin.engine_parts import make_layer

CASES = {
    "a sliding window": {"sliding_window_size": 128},
    "logit soft-capping": {"logit_cap": 30.0},
    "value heads of another size than key heads": {"v_head_dim": 16},
    "cross attention": {"is_cross_attention": True},
    "bidirectional attention": {"attn_type": "encoder_only"},
    "position encoding inside attention": {"pos_encoding_mode": "ALIBI"},
    "interleaved chunked attention (iRoPE)": {"use_irope": True},
    "a temperature by position": {"attribute": ("xai_temperature_len", 1024)},
    "query heads that do not share KV heads evenly": {"num_heads": 3},
}


def test_every_row_has_a_case():
    assert set(CASES) == set(layers.UNSUPPORTED)


@pytest.mark.parametrize("what", CASES)
def test_unsupported_layer_is_named(what):
    changes = dict(CASES[what])
    attribute = changes.pop("attribute", None)
    layer = make_layer(7, **changes)
    if attribute:
        setattr(layer, *attribute)
    model = torch.nn.ModuleList([make_layer(0), torch.nn.Linear(2, 2), layer])
    with pytest.raises(UnsupportedLayer) as caught:
        layers.check(model)
    assert what in str(caught.value) and "[7]" in str(caught.value)


def test_plain_layers_pass():
    layers.check(torch.nn.ModuleList([make_layer(i) for i in range(3)]))
