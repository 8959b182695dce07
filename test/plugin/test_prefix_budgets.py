"""State of the budget predictions on the nodes of SGLang's own radix tree."""

import functools
import logging
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_psa import backend_hooks, compat, prefix_budgets, state
from sglang_psa.hooks import Kind

from sgl_psa.budget import BudgetPrior, PriorError
from sgl_psa.config import PSAConfig
from sgl_psa.prediction import Predictor, prior_settings
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from test.plugin.engine_parts import Mode

PAGE, LAYERS, HEADS, REQUESTS = 4, 2, 3, 4
CONFIG = PSAConfig(predict=True, min_context=16)


def hooked(hook: Any) -> Any:
    """The target of a hook, wrapped as SGLang's registry wraps it."""
    original = getattr(compat_class(hook), hook.target.rpartition(".")[2])

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if hook.kind is Kind.AROUND:
            return hook.function(original, *args, **kwargs)
        result = original(*args, **kwargs)
        new = hook.function(result, *args, **kwargs)
        return result if new is None else new

    return wrapper


def compat_class(hook: Any) -> type:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    assert hook.target.rpartition(".")[0].endswith("radix_cache.RadixCache")
    return RadixCache


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts of the backend that predict, and SGLang's tree with the hooks in place."""
    for hook in prefix_budgets.HOOKS:
        monkeypatch.setattr(compat_class(hook), hook.target.rpartition(".")[2], hooked(hook))
    shape = CacheShape(LAYERS, 64, PAGE, HEADS, 8, torch.device("cpu"))
    backend = SimpleNamespace(
        config=CONFIG,
        rules=RuleTable(CONFIG, REQUESTS, "cpu"),
        wrapper=SimpleNamespace(predictor=Predictor(CONFIG, shape), min_context=CONFIG.min_context),
    )
    backend.wrapper.predictor.state.reserve(REQUESTS)
    monkeypatch.setattr(state, "_backend", backend)
    return backend


@pytest.fixture
def tree(backend: Any) -> Any:
    allocator = SimpleNamespace(
        device="cpu", free_segment=lambda *a, **k: None, free_segments=lambda *a: None
    )
    tree = compat_class(prefix_budgets.HOOKS[0]).create_simulated(
        mock_allocator=allocator, page_size=PAGE
    )
    slots = torch.arange(REQUESTS * 1024).view(REQUESTS, -1)
    tree.req_to_token_pool = SimpleNamespace(req_to_token=slots)
    return tree


class Request:
    """A request that matches its prefix, runs in a slot, and finishes."""

    def __init__(self, tree: Any, prompt: list[int], slot: int, extra_key: str | None = None):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self.tree = tree
        self.psa_rule = RequestRule.default(CONFIG)
        self.origin_input_ids, self.output_ids = array("q", prompt), array("q")
        self.extra_key, self.req_pool_idx = extra_key, slot
        self.cache_protected_len = 0
        key = RadixKey(self.origin_input_ids[:-1], extra_key)
        match = tree.match_prefix(MatchPrefixParams(key=key))
        self.last_node, self.prefix_indices = match.last_device_node, match.device_indices
        tree.inc_lock_ref(self.last_node)

    def forward(self, mode: str) -> None:
        batch = SimpleNamespace(reqs=[self], forward_mode=Mode(mode))
        backend_hooks.store_rules(None, object, batch, None)

    def decode(self, *tokens: int) -> None:
        self.forward("extend")
        for token in tokens:
            self.output_ids.append(token)
            self.forward("decode")

    def finish(self, insert: bool = True) -> None:
        length = len(self.origin_input_ids) + len(self.output_ids)
        self.tree.cache_finished_req(self, is_insert=insert, kv_len_to_handle=length)


def learnt(backend: Any, slot: int, value: float) -> None:
    backend.wrapper.predictor.state.log_needed[slot] = value


def started(backend: Any, tree: Any, prompt: list[int], slot: int = 3, **kwargs: Any) -> float:
    """Where the state of a new request starts; 0 if it inherits nothing."""
    learnt(backend, slot, 0.0)
    before = backend.wrapper.predictor.inherited
    Request(tree, prompt, slot, **kwargs).forward("extend")
    value = backend.wrapper.predictor.state.log_needed[slot]
    assert (value == value[0, 0]).all()
    inherited = float(value[0, 0])
    assert backend.wrapper.predictor.inherited == before + (inherited != 0)
    return inherited


def tokens(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


SHARED = tokens(40)


@pytest.fixture
def finished(backend: Any, tree: Any) -> Any:
    """A request of 40 shared tokens, a question of 8 and an answer of 8 has finished."""
    request = Request(tree, [*SHARED, *tokens(8, 100)], 0)
    request.decode(*tokens(8, 200))
    learnt(backend, 0, 4.0)
    request.finish()
    learnt(backend, 0, 9.0)
    return request


def test_a_shared_prefix_hands_its_state_on(backend, tree, finished) -> None:
    """The node is split where the questions differ, and both parts keep the state."""
    assert started(backend, tree, [*SHARED, *tokens(8, 300)]) == 4.0
    assert started(backend, tree, [*SHARED, *tokens(8, 100), *tokens(8, 200), 7, 8, 9]) == 4.0


def test_the_last_request_through_a_node_decides(backend, tree, finished) -> None:
    request = Request(tree, [*SHARED, *tokens(8, 300)], 1)
    request.decode(*tokens(3, 400))
    learnt(backend, 1, 5.0)
    request.finish()
    assert started(backend, tree, [*SHARED, *tokens(8, 500)]) == 5.0
    assert started(backend, tree, [*SHARED, *tokens(8, 100), *tokens(6, 200)]) == 4.0


def test_other_prefixes_and_other_namespaces_start_without(backend, tree, finished) -> None:
    assert started(backend, tree, tokens(48, 1000)) == 0.0
    assert started(backend, tree, [*SHARED, *tokens(8, 300)], extra_key="psa:other") == 0.0


def test_a_prefix_must_be_half_of_either_request(backend, tree, finished) -> None:
    assert started(backend, tree, [*SHARED[:24], *tokens(8, 300)]) == 0.0
    assert started(backend, tree, [*SHARED[:28], *tokens(8, 300)]) == 4.0
    assert started(backend, tree, [*SHARED, *tokens(60, 300)]) == 0.0
    assert started(backend, tree, [*SHARED, *tokens(40, 600)]) == 4.0


def test_it_goes_with_the_node(backend, tree, finished) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    kept = finished.last_node
    assert tree.evict(EvictParams(num_tokens=1000)).num_tokens_evicted == 56
    assert started(backend, tree, [*SHARED, *tokens(8, 300)]) == 0.0
    assert getattr(kept, prefix_budgets.NODE, None) is None


def test_a_flush_forgets_everything(backend, tree, finished) -> None:
    tree.reset()
    assert started(backend, tree, [*SHARED, *tokens(8, 300)]) == 0.0


@pytest.mark.parametrize("case", ["ended in prefill", "not inserted", "below min_context"])
def test_state_that_is_not_of_the_request_is_not_kept(backend, tree, case: str) -> None:
    prompt = SHARED[:12] if case == "below min_context" else SHARED
    request = Request(tree, prompt, 0)
    request.decode(*([] if case == "ended in prefill" else [90, 91]))
    learnt(backend, 0, 4.0)
    request.finish(insert=case != "not inserted")
    assert started(backend, tree, [*prompt, 91, 92]) == 0.0


def test_a_request_inherits_once(backend, tree, finished) -> None:
    """Chunks of its prefill and its decode steps leave its state alone."""
    request = Request(tree, [*SHARED, *tokens(8, 300)], 2)
    request.forward("extend")
    learnt(backend, 2, 6.0)
    request.forward("extend")
    request.forward("decode")
    assert (backend.wrapper.predictor.state.log_needed[2] == 6.0).all()
    assert backend.wrapper.predictor.inherited == 1


def test_residuals_are_inherited_with_the_predictions(backend, tree, finished) -> None:
    residuals = backend.wrapper.predictor.residuals
    residuals.reserve(REQUESTS, 6)[3] = 9.0
    assert started(backend, tree, [*SHARED, *tokens(8, 300)]) == 4.0
    assert not residuals.sums[3].any()  # nobody had residuals when that request finished
    request = Request(tree, [*SHARED, *tokens(8, 500)], 1)
    request.decode(*tokens(3, 400))
    learnt(backend, 1, 5.0)
    residuals.sums[1] = 7.0
    request.finish()
    residuals.sums[1] = 2.0
    assert started(backend, tree, [*SHARED, *tokens(8, 600)]) == 5.0
    assert (residuals.sums[3] == 7.0).all() and (residuals.sums[1] == 2.0).all()


def test_without_a_tree_there_is_nothing_to_inherit(backend) -> None:
    request = SimpleNamespace(
        last_node=None, prefix_indices=torch.arange(40), origin_input_ids=SHARED, output_ids=[]
    )
    assert prefix_budgets.find(request) is None


def test_without_prediction_nodes_stay_as_they_are(backend, tree) -> None:
    backend.wrapper.predictor = None
    request = Request(tree, SHARED, 0)
    request.decode(90, 91)
    request.finish()
    nodes = list(tree.root_node.children.values())
    assert len(nodes) == 1 and not hasattr(nodes[0], prefix_budgets.NODE)
    assert not hasattr(request, prefix_budgets.DECODED)


def rank_prior(
    monkeypatch: pytest.MonkeyPatch, config: PSAConfig, rank: int, heads: int = HEADS
) -> BudgetPrior | None:
    parallel = SimpleNamespace(attn_tp_rank=rank, attn_tp_size=HEADS)
    # No attribute stays behind: compat looks its names up by itself.
    monkeypatch.setitem(vars(compat), "get_parallel", lambda: parallel)
    pool = SimpleNamespace(layer_num=LAYERS, head_num=1, page_size=16)
    model = SimpleNamespace(get_total_num_kv_heads=lambda: heads)
    return prefix_budgets.load_prior(config, pool, SimpleNamespace(model_config=model))


def test_each_rank_loads_its_heads(monkeypatch, tmp_path, caplog) -> None:
    path = tmp_path / "prior.json"
    log_needed = torch.arange(LAYERS * HEADS, dtype=torch.float32).view(1, LAYERS, HEADS)
    BudgetPrior(torch.tensor([64]), log_needed, prior_settings(CONFIG, 16)).save(path)
    config = PSAConfig(predict=True, budget_prior=str(path))
    with caplog.at_level(logging.WARNING):
        assert rank_prior(monkeypatch, config, 2).log_needed.flatten().tolist() == [2.0, 5.0]
        assert rank_prior(monkeypatch, CONFIG, 2) is None
        assert caplog.messages == []
        other = PSAConfig(predict=True, budget_prior=str(path), delta=0.2, predict_rho=0.9)
        rank_prior(monkeypatch, other, 0)
    assert len(caplog.messages) == 1
    assert f"knob {CONFIG.delta} instead of 0.2, rho 0.97 instead of 0.9:" in caplog.messages[0]
    with pytest.raises(PriorError, match="the model has"):
        rank_prior(monkeypatch, config, 0, heads=HEADS + 1)
