"""The CPU platform: only without an accelerator, and enough for a plain command."""

import os
from types import SimpleNamespace

import pytest
import torch
from sglang_psa import compat, defaults, platform, platform_hooks


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_an_accelerator_keeps_sglangs_platform(monkeypatch, device):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: True)
    assert platform.activate() is None


def test_class_loads_by_its_path(monkeypatch):
    monkeypatch.setattr(compat, "has_accelerator", lambda: False)
    import pkgutil

    loaded = pkgutil.resolve_name(platform.activate())
    assert issubclass(loaded, compat.SRTPlatform)
    made = loaded()
    assert made.get_default_attention_backend() == "torch_native"
    assert made.get_mha_kv_pool_cls() is compat.MHATokenToKVPool
    assert issubclass(made.get_paged_allocator_cls(), compat.PagedTokenToKVPoolAllocator)


def arguments(**changes):
    plain = dict(
        device=None,
        attention_backend=None,
        mem_fraction_static=None,
        tp_size=1,
        page_size=None,
        max_total_tokens=None,
    )
    return SimpleNamespace(**{**plain, **changes})


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(defaults, "on_psa_cpu_platform", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv(defaults.OMP_BIND, raising=False)
    # Set first, so that what the test leaves is taken back.
    monkeypatch.setenv(defaults.CORE_DUMP, "")
    monkeypatch.delenv(defaults.CORE_DUMP)


def test_nothing_is_needed_on_a_cpu_machine(on_cpu):
    args = arguments()
    defaults.apply_cpu_defaults(args)
    assert (args.device, args.attention_backend) == ("cpu", "torch_native")
    assert args.mem_fraction_static == defaults.CPU_MEM_FRACTION
    assert os.environ[defaults.CORE_DUMP] == "0", "a server that fails would wait a minute"


def test_what_is_given_stays(on_cpu, monkeypatch):
    monkeypatch.setenv(defaults.CORE_DUMP, "1")
    args = arguments(device="cpu", attention_backend="psa", mem_fraction_static=0.3)
    defaults.apply_cpu_defaults(args)
    assert (args.attention_backend, args.mem_fraction_static) == ("psa", 0.3)
    assert os.environ[defaults.CORE_DUMP] == "1"


def test_other_platforms_are_untouched(monkeypatch):
    monkeypatch.setattr(defaults, "on_psa_cpu_platform", lambda: False)
    args = arguments()
    defaults.apply_cpu_defaults(args)
    assert args == arguments()


@pytest.mark.parametrize(
    "tp_size, bind", [(1, None), (2, "0,1,2,3|4,5,6,7"), (3, "0,1|2,3|4,5"), (16, None)]
)
def test_ranks_share_the_cores(on_cpu, monkeypatch, tp_size, bind):
    defaults.apply_cpu_defaults(arguments(tp_size=tp_size))
    found = os.environ.pop(defaults.OMP_BIND, None)
    if tp_size == 16:
        assert found.count("|") == 15
    else:
        assert found == bind


def test_a_binding_of_ours_does_not_outlive_its_engine(on_cpu):
    for tp_size, ranks in ((2, 2), (4, 4), (2, 2)):
        defaults.apply_cpu_defaults(arguments(tp_size=tp_size))
        assert os.environ[defaults.OMP_BIND].count("|") == ranks - 1
    defaults.apply_cpu_defaults(arguments(tp_size=1))
    assert defaults.OMP_BIND not in os.environ


def test_a_given_binding_is_kept(on_cpu, monkeypatch):
    monkeypatch.setenv(defaults.OMP_BIND, "0|7")
    defaults.apply_cpu_defaults(arguments(tp_size=2))
    assert os.environ[defaults.OMP_BIND] == "0|7"


@pytest.mark.parametrize(
    "text, cores", [("3", {3}), ("0-3", {0, 1, 2, 3}), ("0,2-3,9", {0, 2, 3, 9})]
)
def test_core_lists(text, cores):
    assert platform_hooks.parse_cores(text) == cores


@pytest.fixture
def process(monkeypatch):
    """A process on cores 0..3 whose binding and thread number are only recorded."""
    seen = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: seen.update(cores=cores))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.update(threads=n))
    monkeypatch.setenv(defaults.OMP_BIND, "set")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return seen


def bind(text):
    platform_hooks.use_own_cores(None, tp_size=2, tp_rank=1, local_omp_cpuid=text)


def test_a_rank_stays_on_its_cores(process):
    bind("2-3,7")
    assert process == {"cores": {2, 3}, "threads": 2}


def test_a_given_thread_number_is_kept(process, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bind("2-3")
    assert process == {"cores": {2, 3}}


def test_without_a_binding_nothing_is_bound(process, monkeypatch):
    monkeypatch.delenv(defaults.OMP_BIND)
    bind("2-3")
    assert process == {}


def test_cores_of_others_are_an_error(process):
    with pytest.raises(ValueError, match=r"'8-9'.*\[0, 1, 2, 3\]"):
        bind("8-9")


def test_triton_is_off_for_psa_alone():
    assert platform_hooks.support_triton(lambda name: True, "psa") is False
    assert platform_hooks.support_triton(lambda name: "asked", "triton") == "asked"


def test_process_groups_do_without_nccl():
    seen = platform_hooks.init_model_parallel_group(lambda *a, **k: (a, k), 1, backend="gloo")
    assert seen == ((1,), {"backend": "gloo", "use_pynccl": False, "use_custom_allreduce": False})


def test_grammar_bitmask_is_what_xgrammar_expects():
    from xgrammar import allocate_token_bitmask

    ours, theirs = platform_hooks.allocate_token_bitmask(100, 3), allocate_token_bitmask(3, 100)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert bool((ours == -1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, width", [(100, 100), (96, 128), (64, 50)])
def test_grammar_mask_forbids_exactly_the_clear_bits(dtype, vocab, width):
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(3, -(-vocab // 32) * 32, generator=generator) < 0.5
    weights = (1 << torch.arange(32, dtype=torch.int64)).expand(3, allowed.shape[1] // 32, 32)
    words = (allowed.view(3, -1, 32) * weights).sum(-1)
    logits = torch.zeros(3, width, dtype=dtype)
    platform_hooks.apply_vocab_mask(None, logits=logits, vocab_mask=words.to(torch.int32))
    expected = allowed[:, :width]
    assert torch.equal(logits[:, : expected.shape[1]] == 0, expected)
    assert bool((logits[:, expected.shape[1] :] == 0).all())


def test_capacity_is_bounded_only_by_default():
    configurator = SimpleNamespace(server_args=arguments(page_size=16))
    limit = platform_hooks.DEFAULT_MAX_TOKENS
    assert platform_hooks.limit_tokens(10 * limit, configurator, 0) == limit
    assert platform_hooks.limit_tokens(160, configurator, 0) == 160
    configurator.server_args.max_total_tokens = 10 * limit
    assert platform_hooks.limit_tokens(10 * limit, configurator, 0) is None
