"""What psa cannot be combined with, in one table; checked before any weights are loaded.

Each row: a name, a test, and what to change. The tests see SGLang's server arguments, and the
model's configuration where the row is about the model. Arguments are checked twice, as given and
as SGLang resolved them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_psa import graph_args
from sglang_psa.graph_args import decode_graph, kind_of_device, tiered

MIN_PAGE, MAX_PAGE = 8, 128
#: Parts of architecture names of models with state-space or linear attention layers.
RECURRENT_ARCHITECTURES = (
    "Mamba",
    "NemotronH",
    "Jamba",
    "FalconH1",
    "KimiLinear",
    "Qwen3Next",
    "Qwen3_5",
    "GraniteMoeHybrid",
)
#: Configuration fields of models with trained sparse attention.
SPARSE_FIELDS = (
    "index_topk",
    "index_n_heads",
    "sparse_attention_config",
    "dual_chunk_attention_config",
)


#: The other way out of the refusals of tiers.
_ONE_TIER = "or drop --psa-device-pool-bytes and --psa-host-pool-bytes"


class IllegalCombination(ValueError):
    """The server was asked for something that psa does not support."""


@dataclass(frozen=True)
class Refusal:
    """One row: ``applies(server_args)``, or ``applies(model_config)`` when ``model`` is set."""

    name: str
    applies: Callable[[Any], bool]
    message: str
    model: bool = False


def _flag(name: str, field: str, why: str) -> Refusal:
    """A row for a switch that must be off."""
    option = "--" + field.replace("_", "-")
    return Refusal(name, lambda a: bool(getattr(a, field)), f"{why}: drop {option}")


def _env_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _bad_page_size(args: Any) -> bool:
    size = args.page_size
    return size is not None and not (MIN_PAGE <= size <= MAX_PAGE and size & (size - 1) == 0)


def _tiers_on_cuda(args: Any) -> bool:
    return tiered(args) and kind_of_device(args) == "cuda"


def _tiers_without_kernels(args: Any) -> bool:
    """Elsewhere than on CUDA; Triton's kernels may be right until the device is known."""
    wrong = ("torch", "flashinfer", "triton") if kind_of_device(args) else ("torch", "flashinfer")
    asked = getattr(args, "psa_backend", None)
    return tiered(args) and (kind_of_device(args) not in ("", "cpu", "cuda") or asked in wrong)


def _other_prefill(args: Any) -> bool:
    return (args.prefill_attention_backend or args.attention_backend) != "psa"


def _prefill_only(args: Any) -> bool:
    prefill = args.prefill_attention_backend or args.attention_backend
    decode = args.decode_attention_backend or args.attention_backend
    return prefill == "psa" and decode is not None and decode != "psa"


def _attention_is_mla(config: Any) -> bool:
    return getattr(config.attention_arch, "name", str(config.attention_arch)) == "MLA"


def _windowed(config: Any) -> bool:
    """Layers with a sliding or chunked window, as SGLang or the model's layer list says."""
    if config.is_hybrid_swa or config.is_local_attention_model:
        return True
    text = config.hf_text_config
    kinds = getattr(text, "layer_types", None) or ()
    if kinds:
        return any(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    used = getattr(text, "use_sliding_window", True)
    return bool(getattr(text, "sliding_window", None)) and bool(used)


def _recurrent(config: Any) -> bool:
    kinds = getattr(config.hf_text_config, "layer_types", None) or ()
    names = " ".join(config.hf_config.architectures or ())
    return any("linear" in kind or "mamba" in kind for kind in kinds) or any(
        part in names for part in RECURRENT_ARCHITECTURES
    )


def _sparse_model(config: Any) -> bool:
    return any(getattr(config.hf_text_config, name, None) for name in SPARSE_FIELDS)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "page size",
        _bad_page_size,
        f"--page-size must be a power of two from {MIN_PAGE} to {MAX_PAGE}: use 16, 32 or 64",
    ),
    Refusal(
        "prefill only",
        _prefill_only,
        "psa is a decode method and prefill alone would gain nothing: "
        "use --attention-backend psa or --decode-attention-backend psa",
    ),
    Refusal(
        "speculative decoding",
        lambda a: a.speculative_algorithm is not None,
        "verification steps of speculative decoding are not supported: "
        "drop --speculative-algorithm",
    ),
    Refusal(
        "KV cache dtype",
        lambda a: a.kv_cache_dtype not in (None, "auto"),
        "KV is kept in the model's own type: use --kv-cache-dtype auto",
    ),
    Refusal(
        "disaggregation",
        lambda a: a.disaggregation_mode not in (None, "null"),
        "KV that arrives from another server bypasses the page summaries: "
        "drop --disaggregation-mode",
    ),
    Refusal(
        "pipeline parallelism",
        lambda a: a.pp_size > 1,
        "pipeline stages are not supported: use --tp-size instead of --pp-size",
    ),
    Refusal(
        "context parallelism",
        lambda a: a.attn_cp_size > 1 or a.dcp_size > 1 or bool(a.enable_prefill_cp),
        "a context split over ranks is not supported: drop --attn-cp-size, --dcp-size and "
        "--enable-prefill-cp",
    ),
    Refusal(
        "decode graph kind",
        lambda a: decode_graph(a) not in ("disabled", "full"),
        "only full decode CUDA graphs are supported: use --cuda-graph-backend-decode full or "
        "disabled",
    ),
    Refusal(
        "decode graph kernels",
        lambda a: decode_graph(a) != "disabled" and graph_args.wait(a),
        "decode CUDA graphs need kernels that never wait for the device: use --psa-backend triton "
        "or flashinfer, or --cuda-graph-backend-decode disabled",
    ),
    Refusal(
        "decode graph settings",
        lambda a: decode_graph(a) != "disabled" and graph_args.chosen_on_the_host(a),
        "policies that choose pages outright, scorer exact and audits run outside of a decode CUDA "
        "graph: use --psa-policy psa or dense and drop --psa-audit-rate, or use "
        "--cuda-graph-backend-decode disabled",
    ),
    Refusal(
        "two tiers and graphs",
        lambda a: tiered(a) and decode_graph(a) != "disabled",
        "K and V that are loaded from the host tier cannot be part of a decode CUDA graph: "
        f"use --cuda-graph-backend-decode disabled, {_ONE_TIER}",
    ),
    Refusal(
        "two tiers and kernels",
        lambda a: not _tiers_on_cuda(a) and _tiers_without_kernels(a),
        "pages are brought from the host tier by the kernels for CPUs: use --device cpu and "
        f"--psa-backend cpu, {_ONE_TIER}",
    ),
    Refusal(
        "two tiers and kernels on CUDA",
        lambda a: _tiers_on_cuda(a) and graph_args.kernels(a) != "triton",
        "on a GPU pages are brought from the host tier by Triton's kernels alone: use "
        f"--psa-backend auto or triton, {_ONE_TIER}",
    ),
    Refusal(
        "two tiers and a host file on CUDA",
        lambda a: _tiers_on_cuda(a) and bool(getattr(a, "psa_host_path", None)),
        "a GPU reads the host tier where it lies, which must be memory: drop --psa-host-path, "
        f"{_ONE_TIER}",
    ),
    Refusal(
        "two tiers and prefill",
        lambda a: tiered(a) and _other_prefill(a),
        "another prefill backend reads a KV cache that is not all in memory: use "
        f"--attention-backend psa alone, {_ONE_TIER}",
    ),
    Refusal(
        "HND layout",
        lambda a: _env_on("SGLANG_USE_HND_KVCACHE"),
        "KV must be indexed by token: unset SGLANG_USE_HND_KVCACHE",
    ),
    Refusal(
        "unified radix tree",
        lambda a: _env_on("SGLANG_ENABLE_UNIFIED_RADIX_TREE"),
        "the unified radix tree is not supported: unset SGLANG_ENABLE_UNIFIED_RADIX_TREE",
    ),
    Refusal(
        "KV sizing after capture",
        lambda a: _env_on("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        "the KV pool must have its size from the start: unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    ),
    Refusal(
        "several tokenizers",
        lambda a: a.tokenizer_worker_num > 1,
        "requests' rules and statistics need one tokenizer process: drop --tokenizer-worker-num",
    ),
    Refusal(
        "Rust HTTP server",
        lambda a: _env_on("SGLANG_RUST_SERVER"),
        "requests' rules and statistics need SGLang's Python HTTP server: unset SGLANG_RUST_SERVER",
    ),
    Refusal(
        "LoRA on CPU",
        lambda a: a.device == "cpu" and bool(a.enable_lora or a.lora_paths),
        "SGLang's LoRA layers pin host memory, which needs an accelerator: drop --enable-lora and "
        "--lora-paths, and serve a model that the adapter was merged into",
    ),
    Refusal(
        "diffusion language models",
        lambda a: a.dllm_algorithm is not None,
        "block diffusion decoding is not supported: drop --dllm-algorithm",
    ),
    _flag("mixed chunk", "enable_mixed_chunk", "decode rows of mixed batches would run dense"),
    _flag("hierarchical cache", "enable_hierarchical_cache", "KV loads bypass the page summaries"),
    _flag("LMCache", "enable_lmcache", "KV loads bypass the page summaries"),
    _flag("FlexKV", "enable_flexkv", "KV loads bypass the page summaries"),
    _flag("HiSparse", "enable_hisparse", "two sparse methods at once"),
    _flag("DP attention", "enable_dp_attention", "padded batches across ranks are not supported"),
    _flag("two-batch overlap", "enable_two_batch_overlap", "split batches are not supported"),
    _flag("PD multiplexing", "enable_pdmux", "split streams are not supported"),
    _flag("torch.compile", "enable_torch_compile", "the decode loop cannot be traced"),
    _flag("memory saver", "enable_memory_saver", "page summaries cannot be released and restored"),
    _flag("unified memory", "enable_unified_memory", "virtual KV slots are not supported"),
    _flag("page-major KV", "enable_page_major_kv_layout", "KV must be laid out by layer and token"),
    _flag("session radix cache", "enable_session_radix_cache", "its tree is not supported"),
    _flag("KV-less prefill", "prefill_only_disable_kv_cache", "there is no decode to speed up"),
    _flag("embedding server", "is_embedding", "an embedding model does not decode"),
    _flag("encoder server", "encoder_only", "an encoder does not decode"),
    _flag("multi-item scoring", "enable_mis", "its attention mask is not supported"),
    _flag(
        "deterministic inference",
        "enable_deterministic_inference",
        "SGLang knows no batch-invariant psa kernels",
    ),
    Refusal(
        "KV canary",
        lambda a: a.kv_canary not in (None, "none"),
        "the KV canary does not know the psa pool: drop --kv-canary",
    ),
    Refusal(
        "MLA model",
        _attention_is_mla,
        "this model has multi-head latent attention; psa needs ordinary KV heads (GQA or MHA): "
        "serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "sliding-window model",
        _windowed,
        "this model has sliding-window or chunked attention layers: "
        "serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "natively sparse model",
        _sparse_model,
        "this model brings its own sparse attention: serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "recurrent layers",
        _recurrent,
        "this model has recurrent or linear attention layers: "
        "serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "encoder-decoder model",
        lambda c: bool(c.is_encoder_decoder),
        "this model has cross attention: serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "embedding model",
        lambda c: not c.is_generation,
        "this model does not generate text: serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "attention sinks",
        lambda c: bool(getattr(c, "has_attention_sinks", False)),
        "this model has learned attention sinks: serve it without --attention-backend psa",
        model=True,
    ),
    Refusal(
        "unequal K and V heads",
        lambda c: c.head_dim != c.v_head_dim,
        "key and value heads of this model differ in size: "
        "serve it without --attention-backend psa",
        model=True,
    ),
)


def check(server_args: Any, model_config: Any = None) -> None:
    """Refuse the first illegal combination.

    Args:
        server_args: SGLang's ``ServerArgs``.
        model_config: SGLang's ``ModelConfig``; ``None`` skips the rows about the model.

    Raises:
        IllegalCombination: naming what is not supported and what to change.
    """
    for row in REFUSALS:
        subject = model_config if row.model else server_args
        if subject is not None and row.applies(subject):
            raise IllegalCombination(f"psa and {row.name}: {row.message}")
