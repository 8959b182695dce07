"""The pool: summaries follow every write, and are forgotten when their page is."""

from types import SimpleNamespace

import pytest
import torch
from sglang_psa import compat, pool_hooks
from sglang_psa.allocator import CpuPagedAllocator

from sgl_psa.config import PSAConfig
from sgl_psa.scorers import SCORERS
from test.plugin.engine_parts import DIM, KV_HEADS, LAYERS, PAGE, make_layer, make_pool


def write(pool, slots, layer=0):
    slots = torch.tensor(slots)
    kv = torch.randn(len(slots), KV_HEADS, DIM)
    pool.set_kv_buffer(make_layer(layer), compat.KVWriteLoc(slots, None), kv, kv.clone())
    return kv


@pytest.fixture(params=["sketch", "two_level", "hybrid"])
def pool(request):
    return make_pool(PSAConfig(backend="reference", scorer=request.param))


def page(number, count=PAGE):
    return list(range(number * PAGE, number * PAGE + count))


def test_every_write_is_summarised(pool):
    kv = write(pool, page(3) + page(5, 3), layer=1)
    torch.testing.assert_close(pool.get_key_buffer(1)[3 * PAGE : 4 * PAGE], kv[:PAGE])
    assert pool.scorer.watermark[1, 3] == PAGE
    assert pool.scorer.watermark[1, 5] == 3
    assert pool.scorer.watermark[0].sum() == 0


def test_heads_lie_apart(pool):
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        assert buffer.shape == (pool.size + PAGE, KV_HEADS, DIM)
        assert buffer.stride() == (DIM, (pool.size + PAGE) * DIM, 1)


def test_reused_page_starts_anew(pool):
    write(pool, page(3))
    write(pool, page(3, 2))
    assert pool.scorer.watermark[0, 3] == 2


@pytest.mark.parametrize("way", ["free", "free_segment"])
def test_released_pages_are_forgotten_and_others_kept(pool, way, monkeypatch):
    release = CpuPagedAllocator._release_page_ids

    def hooked(self, *pages):
        return pool_hooks.release_pages(release(self, *pages), self, *pages)

    monkeypatch.setattr(CpuPagedAllocator, "_release_page_ids", hooked)
    allocator = CpuPagedAllocator(64, PAGE, torch.float32, "cpu", pool, False)
    write(pool, page(3) + page(5))
    getattr(allocator, way)(torch.tensor(page(3)), **({"start_pos": 0} if "_" in way else {}))
    assert pool.scorer.watermark[0, 3] == 0
    assert pool.scorer.watermark[0, 5] == PAGE


def test_flush_forgets_everything(pool):
    allocator = CpuPagedAllocator(64, PAGE, torch.float32, "cpu", pool, False)
    write(pool, page(3) + page(5))
    pool_hooks.clear_pages(None, allocator)
    assert pool.scorer.watermark.sum() == 0


def test_hooks_leave_other_pools_alone():
    allocator = CpuPagedAllocator(64, PAGE, torch.float32, "cpu", SimpleNamespace(), False)
    pool_hooks.release_pages(None, allocator, torch.tensor([1]))
    pool_hooks.clear_pages(None, allocator)


def test_moved_rows_lose_their_summary(pool, monkeypatch):
    write(pool, page(3) + page(5))
    pool.use_native_move_kv_cache = True
    pool.move_kv_cache(torch.tensor([5 * PAGE]), torch.tensor([3 * PAGE]))
    assert pool.scorer.watermark[0, 5] == 0
    assert pool.scorer.watermark[0, 3] == PAGE


def test_rows_restored_from_host_memory_are_summarised(pool):
    write(pool, page(3) + page(4, 5))
    slots = torch.tensor(page(3) + page(4, 5))
    copy = pool.get_cpu_copy(slots)
    target = torch.tensor(page(8) + page(9, 5))
    pool.load_cpu_copy(copy, target)
    torch.testing.assert_close(pool.get_key_buffer(0)[target], pool.get_key_buffer(0)[slots])
    assert pool.scorer.watermark[:, 8].tolist() == [PAGE] * LAYERS
    assert pool.scorer.watermark[:, 9].tolist() == [5] * LAYERS


def test_size_includes_the_summaries(pool):
    k_bytes, v_bytes = pool.get_kv_size_bytes()
    assert k_bytes - v_bytes == pool.scorer.size_bytes() > 0


def values_of(pool, layer, pages):
    """Means and norms of pages, and the same from the value buffer."""
    means, norms = pool.summaries.values.means, pool.summaries.values.norms
    v = pool.get_value_buffer(layer).view(-1, PAGE, KV_HEADS, DIM)[pages]
    kept = means.means[layer, pages, :, 0].float(), norms.norms[layer, pages]
    return kept, (v.mean(1).bfloat16().float(), v.norm(dim=-1).amax(1))


def test_value_summaries_follow_every_write_and_restore():
    pool = make_pool(PSAConfig(backend="reference", compensate=True, stop="change"))
    write(pool, page(3) + page(5), layer=1)
    write(pool, page(3), layer=1)
    copy = pool.get_cpu_copy(torch.tensor(page(3) + page(5)))
    pool.forget_pages(torch.tensor([3, 5]))
    assert pool.scorer.watermark.sum() == 0
    pool.load_cpu_copy(copy, torch.tensor(page(8) + page(3)))
    for pages in ([5], [8, 3]):
        torch.testing.assert_close(*values_of(pool, 1, pages))
    assert pool.scorer.watermark[1, [3, 5, 8]].tolist() == [PAGE, 0, PAGE]
    k_bytes, v_bytes = pool.get_kv_size_bytes()
    pages = (pool.size + PAGE) // PAGE
    extra = LAYERS * pages * KV_HEADS * (2 * DIM + 4)
    assert v_bytes - (k_bytes - pool.scorer.size_bytes()) == extra


@pytest.mark.parametrize(
    "fields",
    [
        *({"scorer": name} for name in SCORERS),
        *({"scorer": name, "summary_bits": 8} for name in ("box", "hybrid")),
        {"compensate": True},
        {"compensate": True, "stop": "change"},
        {"stop": "change", "scorer": "exact"},
    ],
    ids=str,
)
def test_memory_budget_charges_what_the_pool_allocates(fields, monkeypatch):
    config = PSAConfig(backend="reference", **fields)
    pool = make_pool(config)
    monkeypatch.setitem(compat.IMPORTS, "get_parallel", "test.plugin.test_kv_pool:fake_parallel")
    args = SimpleNamespace(
        attention_backend="psa",
        prefill_attention_backend=None,
        decode_attention_backend=None,
        page_size=PAGE,
        **{f"psa_{k}": v for k, v in config.as_dict().items()},
    )
    model = SimpleNamespace(head_dim=DIM, get_num_kv_heads=lambda tp: KV_HEADS)
    configurator = SimpleNamespace(server_args=args, model_config=model)
    plain = 2 * KV_HEADS * DIM * 4 * LAYERS
    charged = pool_hooks.add_summary_bytes(plain, None, configurator, LAYERS)
    slots = pool.size + PAGE
    assert sum(pool.get_kv_size_bytes()) <= charged * slots < sum(pool.get_kv_size_bytes()) * 1.01
    args.attention_backend = "triton"
    assert pool_hooks.add_summary_bytes(plain, None, configurator, LAYERS) is None


def fake_parallel():
    return SimpleNamespace(attn_tp_size=1)


def test_other_backends_get_sglangs_pool():
    args = SimpleNamespace(
        attention_backend="torch_native",
        prefill_attention_backend=None,
        decode_attention_backend=None,
    )
    configurator = SimpleNamespace(server_args=args)
    built = pool_hooks.build_kv_pool(lambda c, **k: ("plain", c, k), configurator, sizes=1)
    assert built == ("plain", configurator, {"sizes": 1})


def test_decode_only_psa_gets_the_psa_pool():
    args = SimpleNamespace(
        attention_backend="triton",
        prefill_attention_backend=None,
        decode_attention_backend="psa",
        **{f"psa_{k}": v for k, v in PSAConfig().as_dict().items()},
    )
    asked = {}
    configurator = SimpleNamespace(server_args=args, _build_mha_kv_pool=asked.update)
    sizes = SimpleNamespace(max_total_num_tokens=64)
    pool_hooks.build_kv_pool(None, configurator, sizes=sizes)
    assert asked["max_total_num_tokens"] == 64
    assert asked["mha_pool_class"].func.__name__ == "PSAKVPool"


@pytest.mark.parametrize("enabled, ours, result", [(True, True, False), (True, False, None)])
def test_fused_store_is_off_only_for_our_pool(enabled, ours, result, monkeypatch, pool):
    found = pool if ours else SimpleNamespace()
    monkeypatch.setattr("sglang.srt.models.utils.get_token_to_kv_pool", lambda: found, raising=True)
    assert pool_hooks.no_fused_store(enabled, None) is result
