"""Write a checkpoint as a transformers folder:
python -m benchmark.recall_model.export --checkpoint DIR/final.pt --tokenizer DIR/data --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from . import tokenizer as tok
from .checkpoint import load_model
from .model import RecallModel, Shape

_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}


def llama_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=tok.BOS_ID,
        eos_token_id=tok.EOS_ID,
        pad_token_id=tok.PAD_ID,
    )


def llama_weights(model: RecallModel) -> dict[str, Tensor]:
    """fp32 weights under transformers' names."""
    state = model.state_dict()
    weights = {
        "model.embed_tokens.weight": state["embedding"],
        "lm_head.weight": state["embedding"],
        "model.norm.weight": state["norm"],
    }
    for layer in range(model.shape.layers):
        for ours, theirs in _NAMES.items():
            weights[f"model.layers.{layer}.{theirs}.weight"] = state[f"blocks.{layer}.{ours}"]
    return weights


def export(checkpoint: Path, tokenizer_folder: Path, out: Path) -> None:
    """bf16 weights, config with both spellings of rope theta, tokenizer with a chat template."""
    model = load_model(checkpoint)
    llama = LlamaForCausalLM(llama_config(model.shape))
    llama.load_state_dict(llama_weights(model), strict=True)
    llama.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=tok.BOS_ID, eos_token_id=tok.EOS_ID, pad_token_id=tok.PAD_ID
    )
    llama.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    config_file = out / "config.json"
    config = json.loads(config_file.read_text())
    config |= {"rope_theta": model.shape.rope_theta, "torch_dtype": "bfloat16"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")),
        bos_token=tok.BOS,
        eos_token=tok.EOS,
        pad_token=tok.PAD,
        model_max_length=model.shape.positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) | {
        "chat_template": tok.CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as a transformers folder")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
