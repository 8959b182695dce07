"""Which decode steps SGLang is left to capture, and of how many requests."""

from types import SimpleNamespace

import pytest
import torch
from sglang_psa import defaults, graph_args

ARGS = dict(
    attention_backend="psa",
    prefill_attention_backend=None,
    device="cuda",
    page_size=16,
    tp_size=1,
    cuda_graph_config=None,
    cuda_graph_backend_decode=None,
    cuda_graph_backend_prefill=None,
    cuda_graph_max_bs_decode=None,
    cuda_graph_bs_decode=None,
    disable_decode_cuda_graph=False,
    psa_backend="auto",
    psa_policy="psa",
    psa_scorer="auto",
    psa_audit_rate=0.0,
    psa_device_pool_bytes=0,
)
LLAMA = SimpleNamespace(
    num_attention_heads=32, context_len=131072, head_dim=128, get_num_kv_heads=lambda tp: 8 // tp
)


def args(**changes):
    return SimpleNamespace(**{**ARGS, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"device": "cuda:1"}, {"psa_backend": "flashinfer"}, {"psa_policy": "dense"}],
    ids=str,
)
def test_steps_are_captured_where_nothing_waits(changes):
    given = args(**changes)
    defaults.apply_psa_defaults(given)
    assert not given.disable_decode_cuda_graph


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"device": "xpu"},
        {"device": None},
        {"psa_backend": "torch"},
        {"psa_policy": "topk"},
        {"psa_scorer": "exact"},
        {"psa_audit_rate": 0.1},
        {"psa_device_pool_bytes": 1 << 20},
    ],
    ids=str,
)
def test_steps_are_not_captured_elsewhere(changes):
    given = args(**changes)
    defaults.apply_psa_defaults(given)
    assert given.disable_decode_cuda_graph


def test_the_device_that_sglang_will_choose_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = args(device=None)
    assert graph_args.possible(given) and given.device is None
    assert not graph_args.possible(args(device=None, psa_backend="torch"))


@pytest.mark.parametrize("chosen", [{"cuda_graph_backend_decode": "disabled"}, {}])
def test_what_was_chosen_stays(chosen):
    given = args(**chosen, psa_backend="torch", cuda_graph_config={"decode": {"bs": [1]}})
    defaults.apply_psa_defaults(given)
    assert not given.disable_decode_cuda_graph and graph_args.sizes_given(given)


def sizes(model, **changes):
    decode = SimpleNamespace(backend="full", bs=[1, 2, 8, 64, 256, 512], max_bs=512)
    for name, value in changes.items():
        setattr(decode, name, value)
    given = args(cuda_graph_config=SimpleNamespace(decode=decode))
    graph_args.limit_sizes(given, model)
    return decode.bs, decode.max_bs


def test_large_batches_of_long_contexts_run_without_a_graph(caplog):
    caplog.set_level("INFO")
    assert sizes(LLAMA, bs=[1, 64, 256], max_bs=256) == ([1, 64, 256], 256)
    assert not caplog.messages
    assert sizes(LLAMA) == ([1, 2, 8, 64, 256], 256)
    assert "up to 256 requests" in caplog.text
    million = SimpleNamespace(**{**vars(LLAMA), "context_len": 1 << 20})
    assert sizes(million) == ([1, 2, 8], 8)
    assert sizes(million, bs=[64], max_bs=64) == ([1], 1)
    assert sizes(LLAMA, backend="disabled") == ([1, 2, 8, 64, 256, 512], 512)
