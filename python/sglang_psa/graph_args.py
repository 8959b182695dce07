"""Decode CUDA graphs in the server's arguments: what was asked for, what can be, how large."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch

from sgl_psa.backends import NEVER_WAITING, resolve_backend
from sgl_psa.policies import POLICIES

logger = logging.getLogger(__name__)

#: Bytes that the buffers of captured steps may take where the user names no batch size.
BUFFER_BYTES = 1 << 30


def decode_graph(args: Any) -> str:
    """The kind of decode CUDA graph that the arguments ask for, ``disabled`` if none."""
    config = getattr(args, "cuda_graph_config", None)
    if config is None:
        return getattr(args, "cuda_graph_backend_decode", None) or "disabled"
    decode = config.get("decode", {}) if isinstance(config, dict) else config.decode
    chosen = decode.get("backend") if isinstance(decode, dict) else decode.backend
    return str(getattr(chosen, "value", chosen) or "disabled").lower()


def kind_of_device(args: Any) -> str:
    """Such as ``cuda``; empty while SGLang has not chosen it."""
    return (args.device or "").split(":")[0]


def kernels(args: Any) -> str:
    """The kernel backend that the arguments name; what ``auto`` stands for on CUDA devices."""
    asked = getattr(args, "psa_backend", None) or "auto"
    return _what_auto_is() if asked == "auto" and kind_of_device(args) == "cuda" else asked


@functools.cache
def _what_auto_is() -> str:
    return resolve_backend("auto", "cuda")


def wait(args: Any) -> bool:
    """Whether the kernels wait for the device; not while that of ``auto`` is unknown."""
    name = kernels(args)
    unknown = name == "auto" and not kind_of_device(args)
    return name not in NEVER_WAITING and not unknown


def chosen_on_the_host(args: Any) -> bool:
    """Whether the host decides in the midst of a step."""
    policy = POLICIES.get(getattr(args, "psa_policy", None) or "psa")
    chooses = policy is not None and policy.select is not None
    exact = getattr(args, "psa_scorer", None) == "exact"
    return chooses or exact or bool(getattr(args, "psa_audit_rate", None))


def tiered(args: Any) -> bool:
    """Whether K and V lie on two tiers."""
    return bool(getattr(args, "psa_device_pool_bytes", None))


def possible(args: Any) -> bool:
    """Whether decode steps can be captured, on the device that SGLang takes if none is named."""
    if not kind_of_device(args) and torch.cuda.is_available():
        args = copy.copy(args)
        args.device = "cuda"
    on_cuda = kind_of_device(args) == "cuda"
    return on_cuda and not wait(args) and not chosen_on_the_host(args) and not tiered(args)


def sizes_given(args: Any) -> bool:
    """Whether the user says which batches are captured."""
    given = (args.cuda_graph_config, args.cuda_graph_max_bs_decode, args.cuda_graph_bs_decode)
    return any(value is not None for value in given)


def row_bytes(args: Any, model: Any) -> int:
    """About what a captured step keeps for one request of the longest context in one layer: two
    scores a page and query head, four words a page and KV head, and partial results of 64 chunks.
    """
    heads = model.num_attention_heads // args.tp_size
    pages = -(-model.context_len // args.page_size)
    kv_heads = model.get_num_kv_heads(args.tp_size)
    return int(pages * (8 * heads + 16 * kv_heads) + 64 * 4 * heads * model.head_dim)


def limit_sizes(args: Any, model: Any) -> None:
    """Capture no batch whose buffers would take more than :data:`BUFFER_BYTES`; larger ones run
    without a graph."""
    decode = args.cuda_graph_config.decode
    most = max(1, BUFFER_BYTES // row_bytes(args, model))
    if decode_graph(args) == "disabled" or not decode.bs or max(decode.bs) <= most:
        return
    decode.bs = [size for size in decode.bs if size <= most] or [1]
    decode.max_bs = max(decode.bs)
    logger.info(
        "PSA: decode CUDA graphs for up to %d requests; with more requests or a context of %d "
        "tokens their buffers would take over %d MiB (--cuda-graph-max-bs-decode to choose)",
        decode.max_bs,
        model.context_len,
        BUFFER_BYTES >> 20,
    )
