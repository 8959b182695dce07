"""The one module that names SGLang internals, and the SGLang versions they were tested with.

``from sglang_psa.compat import MHATokenToKVPool`` imports from SGLang on first use; importing this
module imports nothing. When SGLang moves something, this file changes and no other.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from typing import Any

logger = logging.getLogger(__name__)

#: SGLang versions that every hook was run with: lowest included, highest included.
TESTED = ("0.5.17", "0.5.17")
ALLOW_UNTESTED = "SGL_PSA_ALLOW_UNTESTED_SGLANG"

#: Install the hooks of every process kind: for tools that run the model in the main process.
every_process_kind = False

#: Functions and classes that hooks wrap.
CHECK_SERVER_ARGS = "sglang.srt.server_args.ServerArgs.check_server_args"
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
INIT_MODEL_PARALLEL_GROUP = "sglang.srt.distributed.parallel_state.init_model_parallel_group"
INIT_CPU_THREADS = "sglang.srt.distributed.bootstrap._init_cpu_threads_env"
ALLOCATE_TOKEN_BITMASK = "sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask"
APPLY_VOCAB_MASK = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask"
APPLY_TOKEN_CONSTRAINTS = (
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._apply_token_constraints"
)
PROFILE_AVAILABLE_BYTES = (
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes"
)
BUILD_KV_POOL = (
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool"
)
COMPUTE_CELL_SIZE = (
    "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
)
ENABLE_FUSED_KV_STORE = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
RELEASE_PAGES = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids"
CLEAR_PAGES = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.clear"
NEW_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
NEW_REQUEST = "sglang.srt.managers.schedule_batch.Req.__init__"
INSERT_PREFIX = "sglang.srt.mem_cache.radix_cache.RadixCache.insert"
SPLIT_PREFIX = "sglang.srt.mem_cache.radix_cache.RadixCache._split_node"
CACHE_FINISHED_REQUEST = "sglang.srt.mem_cache.radix_cache.RadixCache.cache_finished_req"
GENERATE_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
CREATE_ABORT_TASK = "sglang.srt.managers.tokenizer_manager.TokenizerManager.create_abort_task"
WAIT_ONE_RESPONSE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response"
BUILD_CHAT_RESPONSE = (
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response"
)
BUILD_COMPLETION_RESPONSE = (
    "sglang.srt.entrypoints.openai.serving_completions."
    "OpenAIServingCompletion._build_completion_response"
)
RUN_HTTP_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
MODEL_FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
INIT_METRICS_REPORTER = "sglang.srt.managers.scheduler.Scheduler.init_metrics_reporter"
GET_INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
INIT_INVARIANT_CHECKER = "sglang.srt.managers.scheduler.Scheduler.init_invariant_checker"
UPDATE_RUNNING_BATCH = "sglang.srt.managers.scheduler.Scheduler.update_running_batch"
GET_NEXT_BATCH = "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run"
ADD_ONE_REQUEST = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
RETRACTION_ORDER = "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order"

#: Name -> where SGLang keeps it.
IMPORTS = {
    "A": "sglang.srt.arg_groups.arg_utils:A",
    "AddReqResult": "sglang.srt.managers.schedule_policy:AddReqResult",
    "Arg": "sglang.srt.arg_groups.arg_utils:Arg",
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "AttentionType": "sglang.srt.layers.radix_attention:AttentionType",
    "CpuDeviceMixin": "sglang.srt.platforms.cpu:CpuDeviceMixin",
    "Engine": "sglang.srt.entrypoints.engine:Engine",
    "GetInternalStateReq": "sglang.srt.managers.io_struct:GetInternalStateReq",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "KVWriteLoc": "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
    "LlamaDecoderLayer": "sglang.srt.models.llama:LlamaDecoderLayer",
    "LogitsProcessor": "sglang.srt.layers.logits_processor:LogitsProcessor",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "PagedTokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator:PagedTokenToKVPoolAllocator",
    "PlatformEnum": "sglang.srt.platforms.interface:PlatformEnum",
    "Qwen2DecoderLayer": "sglang.srt.models.qwen2:Qwen2DecoderLayer",
    "RMSNorm": "sglang.srt.layers.layernorm:RMSNorm",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "RotaryEmbedding": "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding",
    "SRTPlatform": "sglang.srt.platforms.interface:SRTPlatform",
    "ServerArgs": "sglang.srt.server_args:ServerArgs",
    "SiluAndMul": "sglang.srt.layers.activation:SiluAndMul",
    "UnquantizedEmbeddingMethod": (
        "sglang.srt.layers.quantization.unquant:UnquantizedEmbeddingMethod"
    ),
    "UnquantizedLinearMethod": "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "add_attention_backend_choices": "sglang.srt.server_args:add_attention_backend_choices",
    "attention_backend_choices": "sglang.srt.server_args:ATTENTION_BACKEND_CHOICES",
    "current_platform": "sglang.srt.platforms:current_platform",
    "get_bitmask_shape": "sglang.srt.constrained.xgrammar_backend:get_bitmask_shape",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "get_token_to_kv_pool": "sglang.srt.models.utils:get_token_to_kv_pool",
    "http_app": "sglang.srt.entrypoints.http_server:app",
    "load_plugins": "sglang.srt.plugins:load_plugins",
    "register_attention_backend": (
        "sglang.srt.layers.attention.attention_registry:register_attention_backend"
    ),
}


def __getattr__(name: str) -> Any:
    """SGLang's ``name``, imported on first use (PEP 562); see ``IMPORTS``."""
    if name not in IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = IMPORTS[name].split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"sgl-psa needs {module}.{attribute}, which SGLang {sglang_version()} does not have "
            f"({error}); install sglang {tested_range()}"
        ) from error


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang is outside the tested range."""


def sglang_version() -> str:
    """The version of the installed SGLang."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def tested_range() -> str:
    """The tested versions as a pip requirement."""
    low, high = TESTED
    return f"=={low}" if low == high else f">={low},<={high}"


def check_version(version: str | None = None) -> None:
    """Refuse an SGLang outside the tested range.

    Args:
        version: the version to judge; ``None`` means the installed one.

    Raises:
        UnsupportedSGLang: naming the range, unless ``SGL_PSA_ALLOW_UNTESTED_SGLANG=1`` is set,
            which turns the refusal into a warning.
    """
    from packaging.version import InvalidVersion, Version

    found = version if version is not None else sglang_version()
    low, high = TESTED
    try:
        tested = Version(low) <= Version(found) <= Version(high)
    except InvalidVersion:
        tested = False
    if tested:
        return
    message = f"sgl-psa was tested with sglang{tested_range()}, found sglang {found}"
    if os.environ.get(ALLOW_UNTESTED) == "1":
        logger.warning("%s; %s=1 is set, going on", message, ALLOW_UNTESTED)
        return
    raise UnsupportedSGLang(
        f"{message}: install sglang{tested_range()}, or set {ALLOW_UNTESTED}=1 to try it anyway"
    )


def process_kinds() -> frozenset[str]:
    """The kinds of this process among ``main`` and ``scheduler``.

    A scheduler process is one whose plugins are loaded by SGLang's scheduler entry function; the
    process tree does not tell, because users may start an engine in a child process of their own.
    """
    if every_process_kind:
        return frozenset({"main", "scheduler"})
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "run_scheduler_process":
            return frozenset({"scheduler"})
        frame = frame.f_back  # type: ignore[assignment]
    return frozenset({"main"})


def has_accelerator() -> bool:
    """Whether torch sees a CUDA, ROCm or XPU device."""
    import torch

    return bool(torch.cuda.is_available() or torch.xpu.is_available())
