"""Every row of the table of illegal combinations refuses, and nothing legal is refused."""

from types import SimpleNamespace

import pytest
from sglang_psa import refusals
from sglang_psa.refusals import REFUSALS, IllegalCombination

SWITCHES = (
    "enable_mixed_chunk",
    "enable_hierarchical_cache",
    "enable_lmcache",
    "enable_flexkv",
    "enable_hisparse",
    "enable_dp_attention",
    "enable_two_batch_overlap",
    "enable_pdmux",
    "enable_torch_compile",
    "enable_memory_saver",
    "enable_unified_memory",
    "enable_page_major_kv_layout",
    "enable_session_radix_cache",
    "prefill_only_disable_kv_cache",
    "is_embedding",
    "encoder_only",
    "enable_mis",
    "enable_deterministic_inference",
)
ARGS = dict(
    attention_backend="psa",
    device="cpu",
    enable_lora=None,
    lora_paths=None,
    prefill_attention_backend=None,
    decode_attention_backend=None,
    page_size=16,
    speculative_algorithm=None,
    kv_cache_dtype="auto",
    disaggregation_mode="null",
    pp_size=1,
    attn_cp_size=1,
    dcp_size=1,
    enable_prefill_cp=False,
    cuda_graph_config=None,
    cuda_graph_backend_decode=None,
    dllm_algorithm=None,
    tokenizer_worker_num=1,
    kv_canary="none",
    **dict.fromkeys(SWITCHES, False),
)
MODEL = dict(
    attention_arch=SimpleNamespace(name="MHA"),
    is_hybrid_swa=False,
    is_local_attention_model=False,
    is_encoder_decoder=False,
    is_generation=True,
    has_attention_sinks=False,
    head_dim=128,
    v_head_dim=128,
)
HF = dict(architectures=["LlamaForCausalLM"])

TIERED = {"psa:psa_device_pool_bytes": 1 << 20, "psa:psa_host_pool_bytes": 1 << 22}

TIERED_CUDA = {**TIERED, "device": "cuda", "psa:psa_backend": "triton"}

#: row name -> changes that must be refused; "env:X" sets a variable, "hf:X" the model's
#: config, "psa:X" an argument of ours.
CASES = {
    "page size": [{"page_size": 1}, {"page_size": 4}, {"page_size": 24}, {"page_size": 256}],
    "prefill only": [{"decode_attention_backend": "triton"}],
    "speculative decoding": [
        {"speculative_algorithm": "EAGLE"},
        {"speculative_algorithm": "NGRAM"},
    ],
    "KV cache dtype": [
        {"kv_cache_dtype": "bf16"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "fp4_e2m1"},
    ],
    "disaggregation": [{"disaggregation_mode": "prefill"}, {"disaggregation_mode": "decode"}],
    "pipeline parallelism": [{"pp_size": 2}],
    "context parallelism": [{"attn_cp_size": 2}, {"dcp_size": 2}, {"enable_prefill_cp": True}],
    "decode graph kind": [
        {"cuda_graph_backend_decode": "tc_piecewise", "psa:psa_backend": "triton"},
        {"cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="breakable"))},
    ],
    "decode graph kernels": [
        {"cuda_graph_backend_decode": "full"},
        {"cuda_graph_config": {"decode": {"backend": "full"}}, "psa:psa_backend": "auto"},
    ],
    "decode graph settings": [
        {"cuda_graph_backend_decode": "full", "psa:psa_backend": "triton", **change}
        for change in (
            {"psa:psa_policy": "topk"},
            {"psa:psa_policy": "oracle_marginal", "psa:psa_scorer": "exact"},
            {"psa:psa_audit_rate": 0.01},
        )
    ],
    "two tiers and graphs": [{**TIERED_CUDA, "cuda_graph_backend_decode": "full"}],
    "two tiers and kernels": [
        {**TIERED, "device": "xpu"},
        {**TIERED, "psa:psa_backend": "torch"},
        {**TIERED, "device": None, "psa:psa_backend": "torch"},
        {**TIERED, "device": "cpu", "psa:psa_backend": "triton"},
    ],
    "two tiers and kernels on CUDA": [
        {**TIERED, "device": "cuda", "psa:psa_backend": backend}
        for backend in ("torch", "cpu", "reference")
    ],
    "two tiers and a host file on CUDA": [
        {**TIERED_CUDA, "psa:psa_host_path": "/folder"},
        {**TIERED_CUDA, "device": "cuda:1", "psa:psa_host_path": "/folder"},
    ],
    "two tiers and prefill": [
        {**TIERED, "prefill_attention_backend": "triton", "decode_attention_backend": "psa"},
        {**TIERED, "attention_backend": None, "decode_attention_backend": "psa"},
        {**TIERED_CUDA, "prefill_attention_backend": "fa3", "decode_attention_backend": "psa"},
    ],
    "HND layout": [{"env:SGLANG_USE_HND_KVCACHE": "1"}],
    "unified radix tree": [{"env:SGLANG_ENABLE_UNIFIED_RADIX_TREE": "true"}],
    "KV sizing after capture": [{"env:SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}],
    "several tokenizers": [{"tokenizer_worker_num": 2}],
    "Rust HTTP server": [{"env:SGLANG_RUST_SERVER": "1"}],
    "LoRA on CPU": [{"enable_lora": True}, {"lora_paths": ["a=folder"]}],
    "diffusion language models": [{"dllm_algorithm": "x"}],
    "mixed chunk": [{"enable_mixed_chunk": True}],
    "hierarchical cache": [{"enable_hierarchical_cache": True}],
    "LMCache": [{"enable_lmcache": True}],
    "FlexKV": [{"enable_flexkv": True}],
    "HiSparse": [{"enable_hisparse": True}],
    "DP attention": [{"enable_dp_attention": True}],
    "two-batch overlap": [{"enable_two_batch_overlap": True}],
    "PD multiplexing": [{"enable_pdmux": True}],
    "torch.compile": [{"enable_torch_compile": True}],
    "memory saver": [{"enable_memory_saver": True}],
    "unified memory": [{"enable_unified_memory": True}],
    "page-major KV": [{"enable_page_major_kv_layout": True}],
    "session radix cache": [{"enable_session_radix_cache": True}],
    "KV-less prefill": [{"prefill_only_disable_kv_cache": True}],
    "embedding server": [{"is_embedding": True}],
    "encoder server": [{"encoder_only": True}],
    "multi-item scoring": [{"enable_mis": True}],
    "deterministic inference": [{"enable_deterministic_inference": True}],
    "KV canary": [{"kv_canary": "log"}],
    "MLA model": [{"attention_arch": SimpleNamespace(name="MLA")}],
    "sliding-window model": [
        {"is_hybrid_swa": True},
        {"is_local_attention_model": True},
        {"hf:sliding_window": 4096},
        {"hf:layer_types": ["full_attention", "sliding_attention"]},
    ],
    "natively sparse model": [{"hf:index_topk": 2048}, {"hf:sparse_attention_config": {"a": 1}}],
    "recurrent layers": [
        {"hf:layer_types": ["linear_attention", "full_attention"]},
        {"hf:architectures": ["NemotronHForCausalLM"]},
    ],
    "encoder-decoder model": [{"is_encoder_decoder": True}],
    "embedding model": [{"is_generation": False}],
    "attention sinks": [{"has_attention_sinks": True}],
    "unequal K and V heads": [{"v_head_dim": 64}],
}


def build(change, monkeypatch):
    args, model, hf = dict(ARGS), dict(MODEL), dict(HF)
    for key, value in change.items():
        kind, _, name = key.rpartition(":")
        if kind == "env":
            monkeypatch.setenv(name, value)
        elif kind == "psa":
            args[name] = value
        elif kind == "hf":
            hf[name] = value
        elif key in args:
            args[key] = value
        else:
            assert key in model, key
            model[key] = value
    config = SimpleNamespace(**hf)
    return SimpleNamespace(**args), SimpleNamespace(
        **model, hf_config=config, hf_text_config=config
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for change in (c for changes in CASES.values() for c in changes):
        for key in change:
            if key.startswith("env:"):
                monkeypatch.delenv(key.removeprefix("env:"), raising=False)


def test_every_row_has_a_case_and_a_distinct_name():
    names = [row.name for row in REFUSALS]
    assert sorted(names) == sorted(CASES)


@pytest.mark.parametrize(
    "name, change",
    [(name, change) for name, changes in CASES.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_refuses_and_says_what_to_change(name, change, monkeypatch):
    with pytest.raises(IllegalCombination) as caught:
        refusals.check(*build(change, monkeypatch))
    message = str(caught.value)
    assert message.startswith(f"psa and {name}: ")
    assert any(verb in message for verb in ("drop", "use", "unset", "serve it without"))


LEGAL = [
    {},
    {"page_size": None},
    {"page_size": 8},
    {"page_size": 128},
    {"cuda_graph_backend_decode": "disabled", "psa:psa_policy": "topk"},
    {"cuda_graph_backend_decode": "full", "psa:psa_backend": "triton", "psa:psa_policy": "dense"},
    {"cuda_graph_backend_decode": "full", "psa:psa_backend": "auto", "device": "cuda"},
    {"cuda_graph_backend_decode": "full", "psa:psa_backend": "auto", "device": None},
    {**TIERED_CUDA, "psa:psa_backend": "auto"},
    {"cuda_graph_config": {"prefill": {"backend": "breakable"}}},
    {"prefill_attention_backend": "triton", "decode_attention_backend": "psa"},
    {"attention_backend": None, "decode_attention_backend": "psa"},
    {"hf:sliding_window": 4096, "hf:use_sliding_window": False},
    {"hf:layer_types": ["full_attention", "full_attention"], "hf:sliding_window": 4096},
    {"env:SGLANG_USE_HND_KVCACHE": "0"},
    {**TIERED, "psa:psa_backend": "auto"},
    {**TIERED, "device": "cpu", "psa:psa_backend": "cpu"},
    {**TIERED, "psa:psa_host_path": "/folder"},
    {**TIERED_CUDA, "psa:psa_host_path": ""},
    {**TIERED_CUDA, "device": None},
    {**TIERED_CUDA, "device": "cuda:1", "page_size": 32},
    {"psa:psa_device_pool_bytes": 0, "device": "cuda"},
    {"device": "cuda", "enable_lora": True, "lora_paths": ["a=folder"]},
]


@pytest.mark.parametrize("change", LEGAL, ids=str)
def test_legal_combinations_pass(change, monkeypatch):
    refusals.check(*build(change, monkeypatch))


def test_model_rows_wait_for_the_model(monkeypatch):
    args, _ = build({"head_dim": 64}, monkeypatch)
    refusals.check(args)


def test_rows_name_real_server_arguments():
    """A renamed SGLang option would make a row silently useless."""
    import dataclasses

    from sglang_psa.compat import ServerArgs

    known = {f.name for f in dataclasses.fields(ServerArgs)}
    assert set(ARGS) <= known
