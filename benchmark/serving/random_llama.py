"""A Llama of random weights, larger than the embedded model: 224 M parameters, 16 layers.

    python -m benchmark.serving.random_llama FOLDER

What it costs is that of a trained model of its shape; what it says is noise, so nothing measured
with it tells of quality. Random projections make attention flat, which no trained model's is, and a
sparse method would rightly read everything. Queries and keys are therefore scaled until attention
logits spread by ``LOGIT_STD``, which leaves the mass in few pages: by default PSA reads 0.20 of the
bytes at 8k tokens and 0.17 at 16k (an engine, two layers); with Gaussian queries and keys of that
spread it reads 0.12 at 32k, 8 % of the pages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HIDDEN, LAYERS, Q_HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB = 1024, 16, 16, 4, 128, 2816, 1000
WEIGHT_STD = 0.02
LOGIT_STD = 4.0


def config(layers: int = LAYERS) -> dict[str, object]:
    """``config.json`` of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 131072,
        "num_attention_heads": Q_HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def weights(layers: int = LAYERS, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors, bf16."""
    rng = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float = WEIGHT_STD) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng) * std).bfloat16()

    ones = torch.ones(HIDDEN).bfloat16()
    # A normalised input has elements of variance 1, a query and a key those of HIDDEN * std**2,
    # and sum(q * k) / sqrt(DIM) has their product as its standard deviation.
    sharp = (LOGIT_STD / HIDDEN) ** 0.5
    found = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found[at + "self_attn.q_proj.weight"] = normal(Q_HEADS * DIM, HIDDEN, sharp)
        found[at + "self_attn.k_proj.weight"] = normal(KV_HEADS * DIM, HIDDEN, sharp)
        found[at + "self_attn.v_proj.weight"] = normal(KV_HEADS * DIM, HIDDEN)
        found[at + "self_attn.o_proj.weight"] = normal(HIDDEN, Q_HEADS * DIM)
        found[at + "mlp.gate_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        found[at + "mlp.up_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        found[at + "mlp.down_proj.weight"] = normal(HIDDEN, INTERMEDIATE)
        found[at + "input_layernorm.weight"] = ones.clone()
        found[at + "post_attention_layernorm.weight"] = ones.clone()
    return found


def make(folder: Path, layers: int = LAYERS) -> Path:
    """Write the model, unless it is there as it would be written; returns its folder."""
    from safetensors.torch import save_file

    text = json.dumps({**config(layers), "logit_std": LOGIT_STD}, indent=1)
    path = folder / "config.json"
    if path.exists() and path.read_text() == text and (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    save_file(weights(layers), folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    path.write_text(text)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
