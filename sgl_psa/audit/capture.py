"""Queries, keys and values of a Hugging Face model, as its attention layers see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "recall"
_NAME = "psa_capture"


class LayerTensors(NamedTuple):
    """One layer of one context, after rotary embedding.

    Attributes:
        q: [Hq, tokens kept, D], the last tokens of the context.
        k, v: [Hkv, tokens, D].
        sm_scale: factor on q.k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sm_scale: float


class CapturedModel:
    """A causal language model whose dense prefill hands out q, k and v of every layer."""

    def __init__(self, folder: str | Path = EMBEDDED_MODEL) -> None:
        """
        Args:
            folder: a Hugging Face model folder (or hub name) with a tokenizer.
        """
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._layers: list[LayerTensors] = []
        self._keep = 0

        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
            if self._keep:
                scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
                self._layers.append(LayerTensors(q[0, :, -self._keep :], k[0], v[0], scale))
            return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

        AttentionInterface.register(_NAME, attend)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.set_attn_implementation(_NAME)

    @torch.no_grad()
    def layers(self, ids: list[int], keep: int) -> list[LayerTensors]:
        """One dense pass over ``ids``; queries of the last ``keep`` tokens."""
        self._layers, self._keep = [], keep
        try:
            self.model(torch.tensor([ids]), logits_to_keep=1, use_cache=False)
        finally:
            layers, self._layers, self._keep = self._layers, [], 0
        return layers
